"""Photos that metrics are tested on, and views of them that are moved by a known amount."""

from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

from tests.support.repository import ROOT

__all__ = ["PHOTOS", "photo", "recolored", "view"]

PHOTOS = ("cat", "astronaut", "coffee", "rocket", "motorcycle_left")

MARGIN = 1.25
"""Side of what is kept of a photo over that of a view, so that nothing is invented at the edges."""


@cache
def photo(name: str, side: int) -> Image.Image:
    """The center of a photo: ``cat`` of the documents, or one that scikit-image ships."""
    path = ROOT / "docs/images/cat.jpg"
    if name != "cat":
        folder = Path(str(import_module("skimage").__file__)).parent / "data"
        (path,) = (file for file in folder.iterdir() if file.stem == name)
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short, (width, height) = min(image.size), image.size
    box = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
    kept = round(side * MARGIN)
    return image.resize((kept, kept), Image.Resampling.LANCZOS, box)


def view(
    name: str, side: int, *, shift: tuple[float, float] = (0, 0), scale: float = 1, height: int | None = None
) -> np.ndarray:
    """The center of a photo, uint8 [height or side, side, 3], moved (down, right) by ``shift`` and enlarged.

    By cubic splines: the bicubic ``Image.transform`` of Pillow 13 moves by 0.34 pixels what shall move by 0.25.
    """
    kept = np.asarray(photo(name, side), float)
    center, rows = (kept.shape[0] - 1) / 2, side if height is None else height
    down, right = np.mgrid[:rows, :side].astype(float)
    places = [
        (place - (length - 1) / 2 - moved) / scale + center
        for place, length, moved in ((down, rows, shift[0]), (right, side, shift[1]))
    ]
    channels = [map_coordinates(kept[..., channel], places, order=3, mode="mirror") for channel in range(3)]
    return np.stack(channels, axis=2).round().clip(0, 255).astype(np.uint8)


def recolored(image: np.ndarray, *, noise: float = 4, seed: int = 0) -> np.ndarray:
    """The image with more red, less blue, and noise."""
    changed = image * [1.05, 1.0, 0.9] + np.random.default_rng(seed).normal(0, noise, image.shape)
    return changed.clip(0, 255).astype(np.uint8)
