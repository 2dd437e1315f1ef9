"""How good an editor of the pocket model is: its edits of held-out photographs against the exact answers.

Any function from pictures and an instruction to an image can be judged: qie's engines, diffusers, a quantized bundle.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from pocket.edits import EDITS, Instruction, Picture, answer, instruction, say
from pocket.photographs import JUDGED, SIDE, square
from pocket.samples import HELD_OUT_PAIRS
from pocket.scenes import scene

__all__ = ["Case", "Score", "cases", "pair_cases", "psnr_db", "score", "ssim", "views"]

Rgb = NDArray[np.uint8]
Edits = Callable[[Sequence[Rgb], str], Rgb]
"""(pictures, instruction) -> edited image."""

CLOSER = (1.0, 2.0)
"""Views of every photograph: its middle, and the middle of that."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One edit to ask for: ``images`` uint8 [SIDE, SIDE, 3], the exact ``answer``, and the answers to ``others``."""

    name: str
    images: tuple[Rgb, ...]
    text: str
    answer: Rgb
    others: tuple[tuple[str, Rgb], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The mean over the cases of one instruction. ``nearest`` is the share of cases whose result is nearer to the right
    answer than to the answer to any other instruction; ``unedited`` are the figures of the picture as it was."""

    name: str
    cases: int
    psnr_db: float
    ssim: float
    unedited_psnr_db: float
    unedited_ssim: float
    nearest: float


def cases(*, phrases: int | None = None, seed: int = 0) -> Iterator[Case]:
    """Every instruction in every (or the first few) of its phrasings, on every held-out photograph or scene."""
    rng = np.random.default_rng([7, seed])
    photographs = views()
    scenes = [scene(rng, SIDE, SIDE) for _ in photographs]
    for name, edit in EDITS.items():
        pictures = scenes if edit.scene else photographs
        for number, picture in enumerate(pictures):
            second = pictures[(number + 1) % len(pictures)]
            for phrase in range(len(edit.phrases))[:phrases]:
                asked = instruction(rng, name)
                others = {other: instruction(rng, other) for other in EDITS if other != name}
                yield Case(
                    name=name,
                    images=(picture.image, second.image)[: edit.pictures],
                    text=say(asked, phrase),
                    answer=answer(asked, picture, second),
                    others=_answers(others, picture, second),
                )


def views() -> list[Picture]:
    """The held-out photographs as they are edited."""
    return [Picture(image=square(name, closer=closer)) for closer in CLOSER for name in JUDGED]


def pair_cases(*, seed: int = 0) -> Iterator[Case]:
    """Every pair of edits that was never trained on together, on every held-out photograph.

    The others are the other pairs, either edit alone, and the two in the other order where that differs.
    """
    rng = np.random.default_rng([8, seed])
    for picture in views():
        asked = {pair: tuple(instruction(rng, edit) for edit in pair) for pair in HELD_OUT_PAIRS}
        answers = {pair: _in_turn(picture, steps) for pair, steps in asked.items()}
        for pair, steps in asked.items():
            others = [(" + ".join(p), a) for p, a in answers.items() if p != pair]
            others += [(step.name, answer(step, picture)) for step in steps]
            yield Case(
                name=" + ".join(pair),
                images=(picture.image,),
                text=" and ".join(say(step) for step in steps),
                answer=answers[pair],
                others=tuple(others),
            )


def score(edit: Edits, asked: Sequence[Case]) -> list[Score]:
    """The scores of ``edit``, one for each name, in the order of the cases."""
    found: dict[str, list[tuple[float, float, float, float, bool]]] = {}
    for case in asked:
        result = edit(case.images, case.text)
        own = psnr_db(result, case.answer)
        nearest = all(own > psnr_db(result, other) for _, other in case.others)
        before = case.images[0]
        row = (own, ssim(result, case.answer), psnr_db(before, case.answer), ssim(before, case.answer), nearest)
        found.setdefault(case.name, []).append(row)
    return [
        Score(
            name=name,
            cases=len(rows),
            psnr_db=fmean(row[0] for row in rows),
            ssim=fmean(row[1] for row in rows),
            unedited_psnr_db=fmean(row[2] for row in rows),
            unedited_ssim=fmean(row[3] for row in rows),
            nearest=fmean(row[4] for row in rows),
        )
        for name, rows in found.items()
    ]


def psnr_db(found: Rgb, expected: Rgb) -> float:
    """At most 60, so that a mean exists where images are equal."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 60.0 if error == 0 else min(60.0, 10 * float(np.log10(255**2 / error)))


def ssim(found: Rgb, expected: Rgb) -> float:
    return float(structural_similarity(found, expected, channel_axis=2))


def _answers(asked: dict[str, Instruction], picture: Picture, second: Picture) -> tuple[tuple[str, Rgb], ...]:
    """Of every instruction that the picture allows."""
    return tuple(
        (name, answer(other, picture, second))
        for name, other in asked.items()
        if picture.foreground is not None or not EDITS[name].scene
    )


def _in_turn(picture: Picture, steps: Sequence[Instruction]) -> Rgb:
    image = picture.image
    for step in steps:
        image = answer(step, Picture(image=image))
    return image
