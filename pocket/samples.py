"""What a training step sees: pictures, an instruction in words, and the exact result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pocket.edits import EDITS, Instruction, Picture, answer, instruction, say
from pocket.photographs import TRAINED, crop
from pocket.scenes import leaves, scene

__all__ = ["HELD_OUT_PAIRS", "PAIRS", "Mark", "Sample", "picture", "sample"]

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


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text, in characters from its start: there ``step`` has been said, or its option ``key`` where that
    is not empty."""

    end: int
    step: Instruction
    key: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """``images`` and ``target`` are uint8 [H, W, 3]; ``asked`` is what ``text`` says, in its order, and ``marks`` say
    where."""

    images: tuple[NDArray[np.uint8], ...]
    text: str
    marks: tuple[Mark, ...]
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
        asked = list(known[rng.choice(len(known), p=_weights(known))])
        rng.shuffle(asked)
    else:
        asked = [str(rng.choice(names, p=_weights([(name,) for name in names])))]
    source = scene(rng, height, width) if any(EDITS[name].scene for name in asked) else picture(rng, height, width)
    two = max(EDITS[name].pictures for name in asked) > 1
    second = picture(rng, height, width) if two else None
    instructions = [instruction(rng, name) for name in asked]
    target = source.image
    for step in instructions:
        target = answer(step, Picture(image=target, foreground=source.foreground), second)
    images = (source.image, second.image) if second is not None else (source.image,)
    text, marks = _words(rng, instructions)
    return Sample(images=images, text=text, marks=marks, asked=tuple(instructions), target=target)


def _weights(asked: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """How often edits, or pairs of them, come: more often those with many options, and those that move every token."""

    def weight(name: str) -> float:
        edit = EDITS[name]
        return 1 + 0.1 * sum(len(values) for values in edit.options.values()) + 0.5 * (edit.kind == "geometry")

    weights = np.array([np.prod([weight(name) for name in names]) for names in asked])
    return weights / weights.sum()


def _words(rng: np.random.Generator, instructions: Sequence[Instruction]) -> tuple[str, tuple[Mark, ...]]:
    """The instructions as one text, and where each of them and of their options has been said in it."""
    said = [say(step, int(rng.integers(len(EDITS[step.name].phrases)))) for step in instructions]
    joint = str(rng.choice(_JOINTS))
    marks, start = [], 0
    for step, words in zip(instructions, said, strict=True):
        marks += [Mark(start + words.index(value) + len(value), step, key) for key, value in step.options]
        marks.append(Mark(start + len(words), step))
        start += len(words) + len(joint)
    text = joint.join(said) + str(rng.choice(_ENDINGS))
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text, tuple(marks)
