"""What the pocket model knows: instructions in words, and the exact answer to each.

An instruction is a name with, for some, a colour, a shape or a place. Images are uint8 [H, W, 3].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["COLOURS", "EDITS", "Edit", "Instruction", "Picture", "answer", "draw_shape", "instruction", "say"]

Rgb = NDArray[np.uint8]
Kind = Literal["colour", "geometry", "texture", "object", "reference"]

COLOURS: dict[str, tuple[int, int, int]] = {
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
"""Words for a place -> its middle as a share of width and height."""

SHAPE_RADIUS = 0.16
FRAME_SHARE = 1 / 16
"""Of the shorter side."""

BLOCK = 8
"""Pixels: the side of a block of ``pixelate``."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601."""

SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32)
"""The matrix of the W3C's Filter Effects, as most image editors have it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """An image; of a scene also ``foreground``, bool [H, W], true where its things are."""

    image: Rgb
    foreground: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A kind of edit.

    ``apply`` takes the picture, the options and the second picture or None. ``options`` are the choices for each word
    in braces of the ``phrases``, which all mean the same. ``square`` edits are for square images alone, ``scene`` edits
    for pictures with a foreground; ``pictures`` is how many the edit looks at.
    """

    kind: Kind
    apply: Callable[[Picture, Mapping[str, str], Picture | None], Rgb]
    phrases: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    square: bool = False
    scene: bool = False
    pictures: int = 1


@dataclass(frozen=True, slots=True)
class Instruction:
    """An edit with its options settled."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


def instruction(rng: np.random.Generator, name: str) -> Instruction:
    """The edit ``name`` with options drawn at random."""
    drawn = ((key, str(rng.choice(values))) for key, values in EDITS[name].options.items())
    return Instruction(name, tuple(drawn))


def say(instruction: Instruction, phrase: int = 0) -> str:
    """The instruction in words; ``phrase`` counts the ways of saying it, the first one being the plainest."""
    return EDITS[instruction.name].phrases[phrase].format(**dict(instruction.options))


def answer(instruction: Instruction, picture: Picture, second: Picture | None = None) -> Rgb:
    """The exact result of an instruction."""
    return EDITS[instruction.name].apply(picture, dict(instruction.options), second)


def draw_shape(image: Rgb, shape: str, colour: tuple[int, int, int], middle: tuple[float, float], radius: float) -> Rgb:
    """Draw a shape with smooth edges; ``middle`` (x, y) and ``radius`` are in pixels."""
    fine = 4
    height, width = image.shape[:2]
    mask = Image.new("L", (width * fine, height * fine))
    pen = ImageDraw.Draw(mask)
    x, y, r = middle[0] * fine, middle[1] * fine, radius * fine
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        half = r * 0.9
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
    else:
        pen.polygon([(x, y - r), (x - r, y + r * 0.8), (x + r, y + r * 0.8)], fill=255)
    share = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
    return _quantize(_unit(image) * (1 - share) + np.array(colour, np.float32) / 255 * share)


def _unit(image: Rgb) -> NDArray[np.float32]:
    return image.astype(np.float32) / 255


def _quantize(unit: NDArray[Any]) -> Rgb:
    return (np.clip(unit, 0, 1) * 255 + 0.5).astype(np.uint8)


def _luma(image: Rgb) -> NDArray[np.float32]:
    return (_unit(image) @ LUMA)[..., None]


def _blurred(image: Rgb, radius: float) -> Rgb:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _grayscale(p: Picture, *_: Any) -> Rgb:
    return _quantize(np.repeat(_luma(p.image), 3, axis=2))


def _sepia(p: Picture, *_: Any) -> Rgb:
    return _quantize(_unit(p.image) @ SEPIA.T)


def _invert(p: Picture, *_: Any) -> Rgb:
    return 255 - p.image


def _tint(p: Picture, options: Mapping[str, str], *_: Any) -> Rgb:
    colour = np.array(COLOURS[options["colour"]], np.float32) / 255
    return _quantize(0.4 * _unit(p.image) + 0.6 * _luma(p.image) * colour)


def _brighter(p: Picture, *_: Any) -> Rgb:
    return _quantize(_unit(p.image) ** 0.55)


def _darker(p: Picture, *_: Any) -> Rgb:
    return _quantize(_unit(p.image) ** 2.0)


def _contrast(p: Picture, *_: Any) -> Rgb:
    return _quantize((_unit(p.image) - 0.5) * 1.8 + 0.5)


def _mirror(p: Picture, *_: Any) -> Rgb:
    return np.ascontiguousarray(p.image[:, ::-1])


def _upside_down(p: Picture, *_: Any) -> Rgb:
    return np.ascontiguousarray(p.image[::-1])


def _rotate_right(p: Picture, *_: Any) -> Rgb:
    return np.ascontiguousarray(np.rot90(p.image, -1))


def _rotate_left(p: Picture, *_: Any) -> Rgb:
    return np.ascontiguousarray(np.rot90(p.image, 1))


def _blur(p: Picture, *_: Any) -> Rgb:
    return _blurred(p.image, 2.5)


def _sharpen(p: Picture, *_: Any) -> Rgb:
    return _quantize(_unit(p.image) * 2.2 - _unit(_blurred(p.image, 1.5)) * 1.2)


def _pixelate(p: Picture, *_: Any) -> Rgb:
    height, width = p.image.shape[:2]
    blocks = _unit(p.image).reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).mean(axis=(1, 3))
    return _quantize(blocks.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1))


def _edges(p: Picture, *_: Any) -> Rgb:
    """White lines on black: the length of Sobel's gradient of a slightly smoothed luma."""
    luma = np.pad(_luma(_blurred(p.image, 1.0))[..., 0], 1, mode="edge")
    across = luma[:, 2:] - luma[:, :-2]
    down = luma[2:] - luma[:-2]
    x = across[:-2] + 2 * across[1:-1] + across[2:]
    y = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return _quantize(np.repeat(np.hypot(x, y)[..., None], 3, axis=2))


def _draw(p: Picture, options: Mapping[str, str], *_: Any) -> Rgb:
    height, width = p.image.shape[:2]
    across, down = PLACES[options["place"]]
    middle = (across * width, down * height)
    return draw_shape(p.image, options["shape"], COLOURS[options["colour"]], middle, SHAPE_RADIUS * min(height, width))


def _frame(p: Picture, options: Mapping[str, str], *_: Any) -> Rgb:
    made = p.image.copy()
    inset = round(FRAME_SHARE * min(made.shape[:2]))
    for edge in (made[:inset], made[-inset:], made[:, :inset], made[:, -inset:]):
        edge[:] = COLOURS[options["colour"]]
    return made


def _background(p: Picture, options: Mapping[str, str], *_: Any) -> Rgb:
    assert p.foreground is not None
    colour = np.array(COLOURS[options["colour"]], np.uint8)
    return np.where(p.foreground[..., None], p.image, colour)


def _colours_of(p: Picture, _: Mapping[str, str], second: Picture | None) -> Rgb:
    """Mean and spread of every channel as in the second picture (Reinhard et al. 2001, in RGB)."""
    assert second is not None
    own, other = _unit(p.image), _unit(second.image)
    spread = other.std((0, 1)) / np.maximum(own.std((0, 1)), 0.02)
    return _quantize((own - own.mean((0, 1))) * spread + other.mean((0, 1)))


EDITS: dict[str, Edit] = {
    "grayscale": Edit(
        kind="colour",
        apply=_grayscale,
        phrases=(
            "make it grayscale",
            "turn the picture black and white",
            "convert the photo to grayscale",
            "remove all colour",
            "make a black and white photo of it",
        ),
    ),
    "sepia": Edit(
        kind="colour",
        apply=_sepia,
        phrases=(
            "make it sepia",
            "give it a sepia tone",
            "make it look like an old brown photo",
            "apply a sepia filter",
        ),
    ),
    "invert": Edit(
        kind="colour",
        apply=_invert,
        phrases=("invert the colours", "make a negative of it", "turn it into a negative", "invert the image"),
    ),
    "tint": Edit(
        kind="colour",
        apply=_tint,
        phrases=(
            "tint it {colour}",
            "give it a {colour} tint",
            "make everything look {colour}",
            "put a {colour} filter on the photo",
        ),
        options={"colour": TINTS},
    ),
    "brighter": Edit(
        kind="colour",
        apply=_brighter,
        phrases=("make it brighter", "brighten the photo", "add more light", "lighten the picture"),
    ),
    "darker": Edit(
        kind="colour",
        apply=_darker,
        phrases=("make it darker", "darken the photo", "make the picture less bright", "take light away"),
    ),
    "contrast": Edit(
        kind="colour",
        apply=_contrast,
        phrases=("add more contrast", "increase the contrast", "make the contrast stronger", "boost the contrast"),
    ),
    "mirror": Edit(
        kind="geometry",
        apply=_mirror,
        phrases=("flip it left to right", "mirror the image", "flip the photo horizontally", "swap left and right"),
    ),
    "upside down": Edit(
        kind="geometry",
        apply=_upside_down,
        phrases=("flip it upside down", "flip the photo vertically", "turn it on its head", "swap top and bottom"),
    ),
    "rotate right": Edit(
        kind="geometry",
        apply=_rotate_right,
        phrases=(
            "rotate it to the right",
            "rotate the photo 90 degrees clockwise",
            "turn the picture clockwise",
            "give it a quarter turn to the right",
        ),
        square=True,
    ),
    "rotate left": Edit(
        kind="geometry",
        apply=_rotate_left,
        phrases=(
            "rotate it to the left",
            "rotate the photo 90 degrees counterclockwise",
            "turn the picture counterclockwise",
            "give it a quarter turn to the left",
        ),
        square=True,
    ),
    "blur": Edit(
        kind="texture",
        apply=_blur,
        phrases=("blur it", "make the photo blurry", "apply a soft blur", "make it out of focus"),
    ),
    "sharpen": Edit(
        kind="texture",
        apply=_sharpen,
        phrases=("sharpen it", "make the photo sharper", "sharpen the details", "make it crisp"),
    ),
    "pixelate": Edit(
        kind="texture",
        apply=_pixelate,
        phrases=("pixelate it", "turn it into big pixels", "make a mosaic of blocks", "make it look pixelated"),
    ),
    "edges": Edit(
        kind="texture",
        apply=_edges,
        phrases=("show only the edges", "draw the edges", "find the edges", "keep just the outlines"),
    ),
    "draw": Edit(
        kind="object",
        apply=_draw,
        phrases=(
            "draw a {colour} {shape} {place}",
            "add a {colour} {shape} {place}",
            "put a {colour} {shape} {place}",
            "place a {colour} {shape} {place} of the photo",
        ),
        options={"colour": tuple(COLOURS), "shape": SHAPES, "place": tuple(PLACES)},
    ),
    "frame": Edit(
        kind="object",
        apply=_frame,
        phrases=(
            "add a {colour} frame",
            "put a {colour} border around it",
            "frame the photo in {colour}",
            "draw a {colour} frame around the picture",
        ),
        options={"colour": tuple(COLOURS)},
    ),
    "background": Edit(
        kind="object",
        apply=_background,
        phrases=(
            "make the background {colour}",
            "change the background to {colour}",
            "replace the background with {colour}",
            "paint the background {colour}",
        ),
        options={"colour": tuple(COLOURS)},
        scene=True,
    ),
    "colours of picture 2": Edit(
        kind="reference",
        apply=_colours_of,
        phrases=(
            "use the colours of picture 2",
            "take the colours from picture 2",
            "match the colours of picture 2",
            "give picture 1 the colours of picture 2",
        ),
        pictures=2,
    ),
}
"""Name -> edit."""
