"""Edits: edits in a row, each of the result of the one before, as the reference made them."""

from collections.abc import Iterator

import numpy as np

from qie.compiler.metrics.alignment import align
from qie.compiler.metrics.color import mean_delta_e
from qie.compiler.metrics.error import psnr_db
from qie.compiler.validation.checks.check import CheckSpec, Finding, NotApplicable, Outcome
from qie.compiler.validation.checks.quality import failed
from qie.compiler.validation.edits import edit_of, images_of
from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed, Subject, request_of
from qie.engines.errors import QieError
from qie.engines.progress import StageProgress

__all__ = ["SPECS"]


def drift(subject: Subject) -> Iterator[Outcome]:
    """The last image of every chain against the reference's."""
    if subject.golden is None or subject.executed is None:
        yield Finding(value=None, detail=subject.obstacle or "")
        return
    chains = [case for case in subject.golden.cases if case.record.chain]
    for case in chains:
        yield _chain(subject.executed, case, subject.progress)
    if not chains:
        yield NotApplicable(reason="no case of the golden file has edits in a row")


def _chain(executed: Executed, case: GoldenCase, progress: StageProgress) -> Finding:
    first, name = edit_of(executed, case), case.record.name
    if isinstance(first, QieError):
        value, detail = failed(first)
        return Finding(value=value, detail=detail, case=name, on=executed.on)
    images = [first.result.images[0]]
    while len(images) < case.record.chain:
        progress(len(images), case.record.chain)
        images += images_of(executed, [request_of(case, images=images[-1:])])
    colors: list[float] = []
    words: list[str] = []
    for image, expected in zip(images, case.chain, strict=True):
        if image.size != expected.size:
            detail = f"edit {len(colors) + 1} has another size than the reference's"
            return Finding(value=float("nan"), detail=detail, case=name, on=executed.on)
        one, other = np.asarray(image), np.asarray(expected)
        colors.append(mean_delta_e(one, other))
        lies = align(one, other)
        where = "cannot be aligned" if lies is None else f"{lies.distance:.2f} pixels"
        words.append(f"{psnr_db(one, other):.1f} dB, {where}")
    detail = f"PSNR and shift of the edits in a row: {'; '.join(words)}"
    return Finding(value=colors[-1], detail=detail, case=name, on=executed.on, steps=colors)


SPECS = (
    CheckSpec(
        level="edits",
        name="drift",
        metric="mean CIEDE2000 of the last edit in a row",
        unit="",
        gate="gates.edits.drift",
        sense="at most",
        run=drift,
    ),
)
