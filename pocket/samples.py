"""What a training step sees: pictures, an instruction in words, and the exact result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pocket.edits import EDITS, Instruction, Picture, answer, instruction, say
from pocket.photographs import TRAINED, crop
from pocket.scenes import leaves, scene

__all__ = ["HELD_OUT_PAIRS", "PAIRS", "Sample", "picture", "sample"]

PAIRS = tuple(
    (first, second)
    for first, second in combinations(EDITS, 2)
    if EDITS[first].kind != EDITS[second].kind
    and not any(EDITS[name].scene or EDITS[name].pictures > 1 for name in (first, second))
)
"""Edits that can be asked for in one instruction: of different kinds, on any one picture."""

HELD_OUT_PAIRS = PAIRS[3::7]
"""Never trained on together, in either order."""

_JOINTS = (" and ", ", then ", " and then ")
_ENDINGS = ("", "", "", ".", " please", "!")

_PHOTOGRAPH, _SCENE = 0.6, 0.2
"""Shares of the kinds of pictures; the rest are leaves."""

_PAIR = 0.6
"""Share of samples with two edits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """``images`` and ``target`` are uint8 [H, W, 3]; ``asked`` is what ``text`` says, in its order, and ``ends`` where
    each of these ends in the text, in characters."""

    images: tuple[NDArray[np.uint8], ...]
    text: str
    ends: tuple[int, ...]
    asked: tuple[Instruction, ...]
    target: NDArray[np.uint8]


def picture(rng: np.random.Generator, height: int, width: int, *, with_scene: bool = True) -> Picture:
    """A part of a photograph, a scene, or leaves."""
    drawn = rng.random()
    if drawn < _PHOTOGRAPH:
        return Picture(image=crop(rng, str(rng.choice(TRAINED)), height, width))
    if drawn < _PHOTOGRAPH + _SCENE and with_scene:
        return scene(rng, height, width)
    return Picture(image=leaves(rng, height, width))


def sample(rng: np.random.Generator, height: int, width: int, *, pictures: int | None = None) -> Sample:
    """One edit or two, in one of its phrasings; ``pictures`` asks for edits that look at as many."""
    names = [
        name
        for name, edit in EDITS.items()
        if (height == width or not edit.square) and pictures in (None, edit.pictures)
    ]
    if rng.random() < _PAIR and pictures != 2:
        known = [p for p in PAIRS if p not in HELD_OUT_PAIRS and set(p) <= set(names)]
        asked = list(known[rng.integers(len(known))])
        rng.shuffle(asked)
    else:
        asked = [str(rng.choice(names, p=_weights(names)))]
    source = scene(rng, height, width) if any(EDITS[name].scene for name in asked) else picture(rng, height, width)
    two = max(EDITS[name].pictures for name in asked) > 1
    second = picture(rng, height, width) if two else None
    instructions = [instruction(rng, name) for name in asked]
    target = source.image
    for step in instructions:
        target = answer(step, Picture(image=target, foreground=source.foreground), second)
    images = (source.image, second.image) if second is not None else (source.image,)
    text, ends = _words(rng, instructions)
    return Sample(images=images, text=text, ends=ends, asked=tuple(instructions), target=target)


def _weights(names: Sequence[str]) -> NDArray[np.float64]:
    """Edits with many options come more often, and those that move every token."""
    weights = np.array([1 + 0.5 * len(EDITS[name].options) + 0.5 * (EDITS[name].kind == "geometry") for name in names])
    return weights / weights.sum()


def _words(rng: np.random.Generator, instructions: Sequence[Instruction]) -> tuple[str, tuple[int, ...]]:
    """The instructions as one text, and the ends of each in it."""
    said = [say(step, int(rng.integers(len(EDITS[step.name].phrases)))) for step in instructions]
    joint = str(rng.choice(_JOINTS))
    ends = tuple(len(joint.join(said[: number + 1])) for number in range(len(said)))
    text = joint.join(said) + str(rng.choice(_ENDINGS))
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text, ends
