"""Evaluation of an editor on the pocket model's tasks: its edits of held-out photos against the exact results.

It evaluates any function from images and an instruction to an image: qie's engines, diffusers, a quantized bundle.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from pocket.data.edits import EDITS, Instruction, exact_result, instruction_text, random_instruction
from pocket.data.examples import HELD_OUT_PAIRS
from pocket.data.images import EVALUATED, SIDE, center_crop
from pocket.data.operations import Source
from pocket.data.scenes import scene
from qie.compiler.metrics.error import psnr_db

__all__ = ["PSNR_MAX_DB", "Case", "Score", "capped_psnr_db", "cases", "pair_cases", "score", "ssim", "views"]

Rgb = NDArray[np.uint8]
EditFunction = Callable[[Sequence[Rgb], str], Rgb]
"""(images, instruction) -> edited image."""

ZOOMS = (1.0, 2.0)
"""Zooms of the central crop of every photo."""

PSNR_MAX_DB = 60.0
"""Upper bound of a PSNR, so that a mean exists where images are equal."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One edit to evaluate.

    Attributes:
        name: name of the edit, or of both edits of a pair.
        images: the inputs, uint8 [SIDE, SIDE, 3] each.
        text: the instruction.
        target: the exact result.
        other_targets: (name, exact result) of other instructions for the same images.
    """

    name: str
    images: tuple[Rgb, ...]
    text: str
    target: Rgb
    other_targets: tuple[tuple[str, Rgb], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Means over the cases of one name.

    Attributes:
        name: name of the edit, or of both edits of a pair.
        cases: number of cases.
        psnr_db, ssim: result against target.
        unedited_psnr_db, unedited_ssim: input against target.
        nearest: share of cases whose result is nearer to the target than to any of the other targets.
    """

    name: str
    cases: int
    psnr_db: float
    ssim: float
    unedited_psnr_db: float
    unedited_ssim: float
    nearest: float


def cases(*, phrases: int | None = None, seed: int = 0) -> Iterator[Case]:
    """Every edit on every view of a held-out photo or on scenes; ``phrases`` limits the phrases of each edit."""
    rng = np.random.default_rng([7, seed])
    photos = views()
    scenes = [scene(rng, SIDE, SIDE) for _ in photos]
    for name, edit in EDITS.items():
        sources = scenes if edit.scene else photos
        for number, source in enumerate(sources):
            second = sources[(number + 1) % len(sources)]
            for phrase in range(len(edit.phrases))[:phrases]:
                instruction = random_instruction(rng, name)
                others = {other: random_instruction(rng, other) for other in EDITS if other != name}
                yield Case(
                    name=name,
                    images=(source.image, second.image)[: edit.images],
                    text=instruction_text(instruction, phrase),
                    target=exact_result(instruction, source, second),
                    other_targets=_targets(others, source, second),
                )


def views() -> list[Source]:
    """The views of held-out photos that cases edit."""
    return [Source(image=center_crop(name, zoom=zoom)) for zoom in ZOOMS for name in EVALUATED]


def pair_cases(*, seed: int = 0) -> Iterator[Case]:
    """Every pair of edits that training never combines, on every view of a held-out photo.

    The other targets are those of the other pairs and of each edit alone.
    """
    rng = np.random.default_rng([8, seed])
    for source in views():
        pairs = {pair: tuple(random_instruction(rng, edit) for edit in pair) for pair in HELD_OUT_PAIRS}
        targets = {pair: _apply_in_order(source, instructions) for pair, instructions in pairs.items()}
        for pair, instructions in pairs.items():
            others = [(" + ".join(other), target) for other, target in targets.items() if other != pair]
            others += [(instruction.name, exact_result(instruction, source)) for instruction in instructions]
            yield Case(
                name=" + ".join(pair),
                images=(source.image,),
                text=" and ".join(instruction_text(instruction) for instruction in instructions),
                target=targets[pair],
                other_targets=tuple(others),
            )


def score(edit: EditFunction, evaluated: Sequence[Case]) -> list[Score]:
    """The scores of ``edit``, one per name, in the order of the cases."""
    rows: dict[str, list[tuple[float, float, float, float, bool]]] = {}
    for case in evaluated:
        result, unedited = edit(case.images, case.text), case.images[0]
        psnr = capped_psnr_db(result, case.target)
        rows.setdefault(case.name, []).append(
            (
                psnr,
                ssim(result, case.target),
                capped_psnr_db(unedited, case.target),
                ssim(unedited, case.target),
                all(psnr > capped_psnr_db(result, other) for _, other in case.other_targets),
            )
        )
    return [
        Score(
            name=name,
            cases=len(of_name),
            psnr_db=fmean(row[0] for row in of_name),
            ssim=fmean(row[1] for row in of_name),
            unedited_psnr_db=fmean(row[2] for row in of_name),
            unedited_ssim=fmean(row[3] for row in of_name),
            nearest=fmean(row[4] for row in of_name),
        )
        for name, of_name in rows.items()
    ]


def capped_psnr_db(image: Rgb, target: Rgb) -> float:
    """PSNR in dB, at most PSNR_MAX_DB."""
    return min(PSNR_MAX_DB, psnr_db(image, target))


def ssim(image: Rgb, target: Rgb) -> float:
    """Structural similarity over all channels, 1 for equal images (Wang et al. 2004, ``skimage.metrics``)."""
    return float(structural_similarity(image, target, channel_axis=2))


def _targets(instructions: dict[str, Instruction], source: Source, second: Source) -> tuple[tuple[str, Rgb], ...]:
    """The exact results of all instructions that apply to ``source``."""
    return tuple(
        (name, exact_result(instruction, source, second))
        for name, instruction in instructions.items()
        if source.foreground is not None or not EDITS[name].scene
    )


def _apply_in_order(source: Source, instructions: Sequence[Instruction]) -> Rgb:
    image = source.image
    for instruction in instructions:
        image = exact_result(instruction, Source(image=image))
    return image
