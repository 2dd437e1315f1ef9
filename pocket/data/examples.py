"""Training examples: images, an instruction as text, and the exact result."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pocket.data.edits import EDITS, Instruction, exact_result, instruction_text, random_instruction
from pocket.data.images import TRAINED, random_crop
from pocket.data.operations import Source
from pocket.data.scenes import dead_leaves, scene

__all__ = ["HELD_OUT_PAIRS", "PAIRS", "Example", "Mention", "draw_example", "draw_source"]

PAIRS = tuple(
    (first, second)
    for first, second in combinations(EDITS, 2)
    if EDITS[first].kind != EDITS[second].kind
    and not any(EDITS[name].scene or EDITS[name].images > 1 for name in (first, second))
)
"""Edits that one instruction may combine: of different kinds, on any single image."""

HELD_OUT_PAIRS = PAIRS[3::7]
"""Pairs that training never combines, in either order."""

_JOINTS = (" and ", ", then ", " and then ")
_ENDINGS = ("", "", "", ".", " please", "!")

_PHOTO_SHARE, _SCENE_SHARE = 0.6, 0.2
"""Shares of the kinds of sources; the rest are dead leaves."""

_PAIR_SHARE = 0.6
"""Share of examples with two edits."""


@dataclass(frozen=True, slots=True)
class Mention:
    """Where a text has named an instruction or one of its options.

    Attributes:
        end: characters from the start of the text to the end of the mention.
        instruction: the instruction.
        option: the option that is named; empty for the instruction as a whole.
    """

    end: int
    instruction: Instruction
    option: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """An edit to learn.

    Attributes:
        images: the inputs, uint8 [H, W, 3] each.
        text: the instructions as one text.
        mentions: where ``text`` names each instruction and each option.
        instructions: the instructions, in the order of ``text``.
        target: the exact result, uint8 [H, W, 3].
    """

    images: tuple[NDArray[np.uint8], ...]
    text: str
    mentions: tuple[Mention, ...]
    instructions: tuple[Instruction, ...]
    target: NDArray[np.uint8]


def draw_source(rng: np.random.Generator, height: int, width: int) -> Source:
    """A random crop of a photo, a scene, or dead leaves."""
    kind = rng.random()
    if kind < _PHOTO_SHARE:
        return Source(image=random_crop(rng, str(rng.choice(TRAINED)), height, width))
    if kind < _PHOTO_SHARE + _SCENE_SHARE:
        return scene(rng, height, width)
    return Source(image=dead_leaves(rng, height, width))


def draw_example(rng: np.random.Generator, height: int, width: int, *, images: int | None = None) -> Example:
    """A random example of one edit or two; ``images`` limits it to edits that read this number of images."""
    names = [
        name for name, edit in EDITS.items() if (height == width or not edit.square) and images in (None, edit.images)
    ]
    if rng.random() < _PAIR_SHARE and images != 2:
        pairs = [pair for pair in PAIRS if pair not in HELD_OUT_PAIRS and set(pair) <= set(names)]
        chosen = list(pairs[rng.choice(len(pairs), p=_probabilities(pairs))])
        rng.shuffle(chosen)
    else:
        chosen = [str(rng.choice(names, p=_probabilities([(name,) for name in names])))]
    with_scene = any(EDITS[name].scene for name in chosen)
    source = scene(rng, height, width) if with_scene else draw_source(rng, height, width)
    second = draw_source(rng, height, width) if any(EDITS[name].images > 1 for name in chosen) else None
    instructions = [random_instruction(rng, name) for name in chosen]
    target = source.image
    for instruction in instructions:
        target = exact_result(instruction, Source(image=target, foreground=source.foreground), second)
    text, mentions = _text(rng, instructions)
    return Example(
        images=(source.image,) if second is None else (source.image, second.image),
        text=text,
        mentions=mentions,
        instructions=tuple(instructions),
        target=target,
    )


def _probabilities(choices: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """The probability of each choice of edits; higher for edits with many options, and for those that move tokens."""

    def weight(name: str) -> float:
        edit = EDITS[name]
        return 1 + 0.1 * sum(len(values) for values in edit.options.values()) + 0.5 * (edit.kind == "geometry")

    weights = np.array([np.prod([weight(name) for name in names]) for names in choices])
    return weights / weights.sum()


def _text(rng: np.random.Generator, instructions: Sequence[Instruction]) -> tuple[str, tuple[Mention, ...]]:
    """The instructions in random phrases as one text, and its mentions."""
    phrases = [instruction_text(step, int(rng.integers(len(EDITS[step.name].phrases)))) for step in instructions]
    joint = str(rng.choice(_JOINTS))
    mentions, start = [], 0
    for step, phrase in zip(instructions, phrases, strict=True):
        mentions += [Mention(start + phrase.index(v) + len(v), step, option) for option, v in step.options]
        mentions.append(Mention(start + len(phrase), step))
        start += len(phrase) + len(joint)
    text = joint.join(phrases) + str(rng.choice(_ENDINGS))
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text, tuple(mentions)
