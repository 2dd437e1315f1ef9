"""Photos for training and evaluation: those that scikit-image and scikit-learn ship under free licenses.

Whole photos are held out: training sees none of their pixels.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["EVALUATED", "HELD_OUT", "SIDE", "TRAINED", "center_crop", "load_photo", "random_crop"]

SIDE = 128
"""Side in pixels of the square images that the model is made for."""

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")

_FILES = {
    **dict.fromkeys(
        ("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel"), _SKIMAGE
    ),
    **dict.fromkeys(("hubble_deep_field", "ihc", "moon", "motorcycle_left", "motorcycle_right"), _SKIMAGE),
    **dict.fromkeys(("clock_motion", "retina", "rocket"), _SKIMAGE),
    **dict.fromkeys(("china", "flower"), _SKLEARN),
}
"""Name of a photo -> the package that ships it, and the folder inside the package."""

HELD_OUT = ("chelsea", "coffee", "rocket", "flower", "camera", "coins")
"""Photos for evaluation only: a cat, a cup, a rocket launch, a flower, a man with a camera, coins."""

EVALUATED = ("chelsea", "coffee", "rocket", "flower")
"""The held-out photos in color, whose edits are evaluated."""

TRAINED = tuple(name for name in _FILES if name not in HELD_OUT)
"""Photos for training."""


@cache
def load_photo(name: str) -> NDArray[np.uint8]:
    """The photo ``name``, uint8 [H, W, 3].

    Raises:
        ModuleNotFoundError: the package that ships it is not installed; ``qie[pocket]`` lists it.
    """
    package, folder = _FILES[name]
    root = Path(str(import_module(package).__file__)).parent / folder
    (file,) = (file for file in root.iterdir() if file.stem == name and file.suffix in (".png", ".jpg"))
    return np.asarray(Image.open(file).convert("RGB"))


def center_crop(name: str, *, zoom: float = 1.0, side: int = SIDE) -> NDArray[np.uint8]:
    """The central square of a photo, uint8 [side, side, 3]; ``zoom`` divides the side of the square."""
    image = load_photo(name)
    height, width = image.shape[:2]
    short = int(min(height, width) / zoom)
    top, left = (height - short) // 2, (width - short) // 2
    return _resize(image[top : top + short, left : left + short], side, side)


def random_crop(rng: np.random.Generator, name: str, height: int, width: int) -> NDArray[np.uint8]:
    """A random crop of a photo, uint8 [height, width, 3], at any position and any scale up to the whole photo.

    It is flipped at random, and its colors vary: few photos have to give many images.
    """
    image = load_photo(name)
    scale_max = min(image.shape[0] / height, image.shape[1] / width)
    scale = np.exp(rng.uniform(0, np.log(max(scale_max, 1.0))))
    rows, columns = min(int(height * scale), image.shape[0]), min(int(width * scale), image.shape[1])
    top = rng.integers(0, image.shape[0] - rows + 1)
    left = rng.integers(0, image.shape[1] - columns + 1)
    crop = _resize(image[top : top + rows, left : left + columns], height, width)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.5:
        gains, gamma = rng.uniform(0.75, 1.2, 3), np.exp(rng.uniform(-0.3, 0.3))
        crop = (np.clip((crop / 255.0) ** gamma * gains, 0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.random() < 0.2:
        crop = crop[:, :, rng.permutation(3)]
    return np.ascontiguousarray(crop)


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
