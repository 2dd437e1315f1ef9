"""The edits that the pocket model learns: instructions as text, and the exact result of each.

An instruction is the name of an edit and its options: a color, a shape or a place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pocket.data.operations import (
    COLORS,
    PLACES,
    SHAPES,
    TINTS,
    Rgb,
    Source,
    background,
    blur,
    brighter,
    contrast,
    darker,
    draw,
    edges,
    frame,
    grayscale,
    invert,
    match_colors,
    mirror,
    pixelate,
    rotate_left,
    rotate_right,
    sepia,
    sharpen,
    tint,
    upside_down,
)

__all__ = ["EDITS", "Edit", "Instruction", "exact_result", "instruction_text", "random_instruction"]

Kind = Literal["color", "geometry", "texture", "object", "reference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A kind of edit.

    Attributes:
        kind: a group of edits; two edits of one instruction are of different groups.
        apply: the exact result for a source, the options, and the second source or None.
        phrases: equivalent instructions, with the names of options in braces; the first is the plainest.
        options: the values of each option.
        square: whether it applies only to square images.
        scene: whether it applies only to sources with a foreground.
        images: number of images that it reads.
    """

    kind: Kind
    apply: Callable[[Source, Mapping[str, str], Source | None], Rgb]
    phrases: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    square: bool = False
    scene: bool = False
    images: int = 1


@dataclass(frozen=True, slots=True)
class Instruction:
    """An edit with values for its options."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


def random_instruction(rng: np.random.Generator, name: str) -> Instruction:
    """The edit ``name`` with random options."""
    drawn = ((key, str(rng.choice(values))) for key, values in EDITS[name].options.items())
    return Instruction(name, tuple(drawn))


def instruction_text(instruction: Instruction, phrase: int = 0) -> str:
    """The instruction as text; ``phrase`` is an index into the edit's phrases."""
    return EDITS[instruction.name].phrases[phrase].format(**dict(instruction.options))


def exact_result(instruction: Instruction, source: Source, second: Source | None = None) -> Rgb:
    """The exact result of an instruction, uint8 [H, W, 3]."""
    return EDITS[instruction.name].apply(source, dict(instruction.options), second)


EDITS: dict[str, Edit] = {
    "grayscale": Edit(
        kind="color",
        apply=grayscale,
        phrases=(
            "make it grayscale",
            "turn the picture black and white",
            "convert the photo to grayscale",
            "remove all colour",
            "make a black and white photo of it",
        ),
    ),
    "sepia": Edit(
        kind="color",
        apply=sepia,
        phrases=(
            "make it sepia",
            "give it a sepia tone",
            "make it look like an old brown photo",
            "apply a sepia filter",
        ),
    ),
    "invert": Edit(
        kind="color",
        apply=invert,
        phrases=("invert the colours", "make a negative of it", "turn it into a negative", "invert the image"),
    ),
    "tint": Edit(
        kind="color",
        apply=tint,
        phrases=(
            "tint it {color}",
            "give it a {color} tint",
            "make everything look {color}",
            "put a {color} filter on the photo",
        ),
        options={"color": TINTS},
    ),
    "brighter": Edit(
        kind="color",
        apply=brighter,
        phrases=("make it brighter", "brighten the photo", "add more light", "lighten the picture"),
    ),
    "darker": Edit(
        kind="color",
        apply=darker,
        phrases=("make it darker", "darken the photo", "make the picture less bright", "take light away"),
    ),
    "contrast": Edit(
        kind="color",
        apply=contrast,
        phrases=("add more contrast", "increase the contrast", "make the contrast stronger", "boost the contrast"),
    ),
    "mirror": Edit(
        kind="geometry",
        apply=mirror,
        phrases=("flip it left to right", "mirror the image", "flip the photo horizontally", "swap left and right"),
    ),
    "upside down": Edit(
        kind="geometry",
        apply=upside_down,
        phrases=("flip it upside down", "flip the photo vertically", "turn it on its head", "swap top and bottom"),
    ),
    "rotate right": Edit(
        kind="geometry",
        apply=rotate_right,
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
        apply=rotate_left,
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
        apply=blur,
        phrases=("blur it", "make the photo blurry", "apply a soft blur", "make it out of focus"),
    ),
    "sharpen": Edit(
        kind="texture",
        apply=sharpen,
        phrases=("sharpen it", "make the photo sharper", "sharpen the details", "make it crisp"),
    ),
    "pixelate": Edit(
        kind="texture",
        apply=pixelate,
        phrases=("pixelate it", "turn it into big pixels", "make a mosaic of blocks", "make it look pixelated"),
    ),
    "edges": Edit(
        kind="texture",
        apply=edges,
        phrases=("show only the edges", "draw the edges", "find the edges", "keep just the outlines"),
    ),
    "draw": Edit(
        kind="object",
        apply=draw,
        phrases=(
            "draw a {color} {shape} {place}",
            "add a {color} {shape} {place}",
            "put a {color} {shape} {place}",
            "place a {color} {shape} {place} of the photo",
        ),
        options={"color": tuple(COLORS), "shape": SHAPES, "place": tuple(PLACES)},
    ),
    "frame": Edit(
        kind="object",
        apply=frame,
        phrases=(
            "add a {color} frame",
            "put a {color} border around it",
            "frame the photo in {color}",
            "draw a {color} frame around the picture",
        ),
        options={"color": tuple(COLORS)},
    ),
    "background": Edit(
        kind="object",
        apply=background,
        phrases=(
            "make the background {color}",
            "change the background to {color}",
            "replace the background with {color}",
            "paint the background {color}",
        ),
        options={"color": tuple(COLORS)},
        scene=True,
    ),
    "colours of picture 2": Edit(
        kind="reference",
        apply=match_colors,
        phrases=(
            "use the colours of picture 2",
            "take the colours from picture 2",
            "match the colours of picture 2",
            "give picture 1 the colours of picture 2",
        ),
        images=2,
    ),
}
"""Name -> edit. The phrases are what the model is trained on; a change of them needs a new training."""
