"""The pixel operations behind the edits: the exact result of each, from uint8 [H, W, 3] to uint8 [H, W, 3].

Every operation takes the source, the options of the instruction, and the second source or None.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = [
    "BLOCK",
    "COLORS",
    "PLACES",
    "SHAPES",
    "TINTS",
    "Rgb",
    "Source",
    "background",
    "blur",
    "brighter",
    "contrast",
    "darker",
    "draw",
    "draw_shape",
    "edges",
    "frame",
    "grayscale",
    "invert",
    "match_colors",
    "mirror",
    "pixelate",
    "rotate_left",
    "rotate_right",
    "sepia",
    "sharpen",
    "tint",
    "upside_down",
]

Rgb = NDArray[np.uint8]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 215, 50),
    "orange": (240, 140, 40),
    "purple": (140, 60, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
TINTS = ("red", "green", "blue", "yellow", "orange", "purple")
SHAPES = ("circle", "square", "triangle")
PLACES: dict[str, tuple[float, float]] = {
    "in the middle": (0.5, 0.5),
    "at the top left": (0.25, 0.25),
    "at the top right": (0.75, 0.25),
    "at the bottom left": (0.25, 0.75),
    "at the bottom right": (0.75, 0.75),
}
"""Phrase of a place -> its center as shares of width and height."""

SHAPE_RADIUS = 0.16
"""Radius of a drawn shape as a share of the shorter side."""

FRAME_WIDTH = 1 / 16
"""Width of a frame as a share of the shorter side."""

BLOCK = 8
"""Side in pixels of the blocks of ``pixelate``."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""

SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32)
"""The matrix of the W3C's Filter Effects (``sepia()``), which most image editors use."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """An image to edit.

    Attributes:
        image: uint8 [H, W, 3].
        foreground: bool [H, W], true on the objects of a scene; None for other images.
    """

    image: Rgb
    foreground: NDArray[np.bool_] | None = None


def draw_shape(image: Rgb, shape: str, color: tuple[int, int, int], center: tuple[float, float], radius: float) -> Rgb:
    """``image`` with an antialiased shape; ``center`` (x, y) and ``radius`` are in pixels."""
    supersampling = 4
    height, width = image.shape[:2]
    mask = Image.new("L", (width * supersampling, height * supersampling))
    draw = ImageDraw.Draw(mask)
    x, y, r = center[0] * supersampling, center[1] * supersampling, radius * supersampling
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        half = r * 0.9
        draw.rectangle((x - half, y - half, x + half, y + half), fill=255)
    else:
        draw.polygon([(x, y - r), (x - r, y + r * 0.8), (x + r, y + r * 0.8)], fill=255)
    share = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
    return _quantize(_unit(image) * (1 - share) + np.array(color, np.float32) / 255 * share)


def _unit(image: Rgb) -> NDArray[np.float32]:
    return image.astype(np.float32) / 255


def _quantize(unit: NDArray[Any]) -> Rgb:
    return (np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)


def _luma(image: Rgb) -> NDArray[np.float32]:
    return (_unit(image) @ LUMA)[..., None]


def _blurred(image: Rgb, radius: float) -> Rgb:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def grayscale(source: Source, *_: Any) -> Rgb:
    return _quantize(np.repeat(_luma(source.image), 3, axis=2))


def sepia(source: Source, *_: Any) -> Rgb:
    return _quantize(_unit(source.image) @ SEPIA.T)


def invert(source: Source, *_: Any) -> Rgb:
    return 255 - source.image


def tint(source: Source, options: Mapping[str, str], *_: Any) -> Rgb:
    color = np.array(COLORS[options["color"]], np.float32) / 255
    return _quantize(0.4 * _unit(source.image) + 0.6 * _luma(source.image) * color)


def brighter(source: Source, *_: Any) -> Rgb:
    return _quantize(_unit(source.image) ** 0.55)


def darker(source: Source, *_: Any) -> Rgb:
    return _quantize(_unit(source.image) ** 2.0)


def contrast(source: Source, *_: Any) -> Rgb:
    return _quantize((_unit(source.image) - 0.5) * 1.8 + 0.5)


def mirror(source: Source, *_: Any) -> Rgb:
    return np.ascontiguousarray(source.image[:, ::-1])


def upside_down(source: Source, *_: Any) -> Rgb:
    return np.ascontiguousarray(source.image[::-1])


def rotate_right(source: Source, *_: Any) -> Rgb:
    return np.ascontiguousarray(np.rot90(source.image, -1))


def rotate_left(source: Source, *_: Any) -> Rgb:
    return np.ascontiguousarray(np.rot90(source.image, 1))


def blur(source: Source, *_: Any) -> Rgb:
    return _blurred(source.image, 2.5)


def sharpen(source: Source, *_: Any) -> Rgb:
    return _quantize(_unit(source.image) * 2.2 - _unit(_blurred(source.image, 1.5)) * 1.2)


def pixelate(source: Source, *_: Any) -> Rgb:
    height, width = source.image.shape[:2]
    blocks = _unit(source.image).reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).mean(axis=(1, 3))
    return _quantize(blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1))


def edges(source: Source, *_: Any) -> Rgb:
    """White edges on black: the magnitude of the Sobel gradient of the blurred luma."""
    luma = np.pad(_luma(_blurred(source.image, 1.0))[..., 0], 1, mode="edge")
    across = luma[:, 2:] - luma[:, :-2]
    down = luma[2:] - luma[:-2]
    x = across[:-2] + 2 * across[1:-1] + across[2:]
    y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return _quantize(np.repeat(np.hypot(x, y)[..., None], 3, axis=2))


def draw(source: Source, options: Mapping[str, str], *_: Any) -> Rgb:
    height, width = source.image.shape[:2]
    across, down = PLACES[options["place"]]
    center = (across * width, down * height)
    return draw_shape(
        source.image, options["shape"], COLORS[options["color"]], center, SHAPE_RADIUS * min(height, width)
    )


def frame(source: Source, options: Mapping[str, str], *_: Any) -> Rgb:
    framed = source.image.copy()
    inset = round(FRAME_WIDTH * min(framed.shape[:2]))
    for edge in (framed[:inset], framed[-inset:], framed[:, :inset], framed[:, -inset:]):
        edge[:] = COLORS[options["color"]]
    return framed


def background(source: Source, options: Mapping[str, str], *_: Any) -> Rgb:
    assert source.foreground is not None
    color = np.array(COLORS[options["color"]], np.uint8)
    return np.where(source.foreground[..., None], source.image, color)


def match_colors(source: Source, _: Mapping[str, str], second: Source | None) -> Rgb:
    """The image with the mean and the standard deviation of each channel of the second image.

    Reinhard et al., "Color transfer between images" (2001), in RGB.
    """
    assert second is not None
    own, other = _unit(source.image), _unit(second.image)
    gain = other.std((0, 1)) / np.maximum(own.std((0, 1)), 0.02)
    return _quantize((own - own.mean((0, 1))) * gain + other.mean((0, 1)))
