"""The photographs that the pocket model sees: those that scikit-image and scikit-learn ship under free licences.

Whole photographs are held out: none of their pixels is ever trained on.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["HELD_OUT", "JUDGED", "SIDE", "TRAINED", "crop", "photograph", "square"]

SIDE = 128
"""Pixels: the side of the square images that the model is made for."""

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")

_FILES = {
    **dict.fromkeys(
        ("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel"), _SKIMAGE
    ),
    **dict.fromkeys(("hubble_deep_field", "ihc", "moon", "motorcycle_left", "motorcycle_right"), _SKIMAGE),
    **dict.fromkeys(("clock_motion", "retina", "rocket"), _SKIMAGE),
    **dict.fromkeys(("china", "flower"), _SKLEARN),
}
"""Name of a photograph -> the package that ships it, and where."""

HELD_OUT = ("chelsea", "coffee", "rocket", "flower", "camera", "coins")
"""A cat, a cup, a launch, a flower, a man with a camera, and coins: for judging alone."""

JUDGED = ("chelsea", "coffee", "rocket", "flower")
"""Those of the held-out photographs that have colours."""

TRAINED = tuple(name for name in _FILES if name not in HELD_OUT)


@cache
def photograph(name: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3].

    Raises:
        ModuleNotFoundError: the package that ships it is not installed; ``qie[pocket]`` names it.
    """
    package, folder = _FILES[name]
    root = Path(str(import_module(package).__file__)).parent / folder
    (file,) = (file for file in root.iterdir() if file.stem == name and file.suffix in (".png", ".jpg"))
    return np.asarray(Image.open(file).convert("RGB"))


def square(name: str, *, closer: float = 1.0, side: int = SIDE) -> NDArray[np.uint8]:
    """The middle of a photograph, uint8 [side, side, 3]; ``closer`` shows as much less of it."""
    image = photograph(name)
    height, width = image.shape[:2]
    short = int(min(height, width) / closer)
    top, left = (height - short) // 2, (width - short) // 2
    return _resize(image[top : top + short, left : left + short], side, side)


def crop(rng: np.random.Generator, name: str, height: int, width: int) -> NDArray[np.uint8]:
    """A part of a photograph, uint8 [height, width, 3]: any place and scale up to the whole, mirrored or not.

    Colours vary a little, so that few photographs give many.
    """
    image = photograph(name)
    most = min(image.shape[0] / height, image.shape[1] / width)
    scale = np.exp(rng.uniform(0, np.log(max(most, 1.0))))
    rows, columns = min(int(height * scale), image.shape[0]), min(int(width * scale), image.shape[1])
    top = rng.integers(0, image.shape[0] - rows + 1)
    left = rng.integers(0, image.shape[1] - columns + 1)
    part = _resize(image[top : top + rows, left : left + columns], height, width)
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if rng.random() < 0.5:
        gains, gamma = rng.uniform(0.75, 1.2, 3), np.exp(rng.uniform(-0.3, 0.3))
        part = (np.clip((part / 255.0) ** gamma * gains, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.random() < 0.2:
        part = part[:, :, rng.permutation(3)]
    return np.ascontiguousarray(part)


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
