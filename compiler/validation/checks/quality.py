"""Edits: how far the edit of each case is from the reference's, and from the exact answer."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np

from qie.compiler.metrics.color import FEWEST, mean_delta_e, untouched
from qie.compiler.metrics.error import psnr_db
from qie.compiler.metrics.perceptual import SMALLEST, lpips
from qie.compiler.metrics.similarity import ssim
from qie.compiler.validation.checks.check import CheckSpec, Finding, NotApplicable, Outcome, not_computed, not_taken
from qie.compiler.validation.edits import CaseEdit, edit_of
from qie.compiler.validation.golden.file import png
from qie.compiler.validation.report import CaseImages, Measurement
from qie.compiler.validation.subject import Subject
from qie.engines.errors import BackendMissingError, QieError, RequestError
from qie.engines.inputs.prepare import resize

__all__ = ["SPECS", "failed"]

Measured = tuple[float | None, str]
"""The value of a case, None where it cannot be told, and what was found."""

Measure = Callable[[CaseEdit], Measured | None]
"""The value of an edit; None where the check says nothing about its case."""


def compared(subject: Subject, *, measure: Measure, lacking: str = "") -> Iterator[Outcome]:
    """The value of ``measure`` for the edit of every case; ``lacking`` says why none has one."""
    if subject.golden is None or subject.executed is None:
        yield Finding(value=None, detail=subject.obstacle or "")
        return
    cases, found = subject.golden.cases, 0
    for number, case in enumerate(cases):
        subject.progress(number, len(cases))
        edit = edit_of(subject.executed, case)
        if isinstance(edit, QieError):
            result: Measured | None = failed(edit)
        elif edit.image.shape != edit.expected.shape:
            result = math.nan, f"the edit has {_size(edit.image)} pixels, expected {_size(edit.expected)}"
        else:
            result = measure(edit)
        if result is not None:
            found += 1
            value, detail = result
            yield Finding(value=value, detail=detail, case=case.record.name, on=subject.executed.on)
    if not found:
        yield NotApplicable(reason=lacking)


def failed(problem: QieError) -> Measured:
    """What an edit that raised is worth: a case that the bundle does not take is not run, any other is a failure."""
    if isinstance(problem, RequestError):
        return None, not_taken(problem)
    return math.nan, not_computed(problem)


def psnr(subject: Subject) -> Iterator[Outcome]:
    """PSNR against the reference's edit; also the images themselves, and the time of every stage."""
    yield from compared(subject, measure=_psnr)
    if subject.golden is None or subject.executed is None:
        return
    for case in subject.golden.cases:
        edit = edit_of(subject.executed, case)
        if isinstance(edit, QieError):
            continue
        yield CaseImages(
            case=case.record.name,
            instruction=case.record.instruction,
            inputs=tuple(png(image).tobytes() for image in case.images),
            reference=png(case.edit).tobytes(),
            edit=png(edit.image).tobytes(),
        )
        for stage, seconds in edit.result.seconds.items():
            yield Measurement(name=stage, case=case.record.name, value=seconds, unit="s")


def _psnr(edit: CaseEdit) -> Measured:
    differing = np.mean(np.any(edit.image != edit.expected, axis=2))
    return psnr_db(edit.image, edit.expected), f"{differing:.1%} of the pixels differ"


def _ssim(edit: CaseEdit) -> Measured:
    return ssim(edit.image, edit.expected), ""


def learned(subject: Subject) -> Iterator[Outcome]:
    """LPIPS, where its package and its weights are there."""
    try:
        yield from compared(subject, measure=_lpips)
    except BackendMissingError as problem:
        yield Finding(value=None, detail=str(problem))


def _lpips(edit: CaseEdit) -> Measured:
    if min(edit.image.shape[:2]) < SMALLEST:
        return (
            None,
            f"the edit has {_size(edit.image)} pixels, and LPIPS takes sides from {SMALLEST}; use a larger case",
        )
    return lpips(edit.image, edit.expected), "AlexNet, version 0.1"


def _shift(edit: CaseEdit) -> Measured:
    if edit.alignment is None:
        return _unaligned(edit)
    down, right = edit.alignment.shift
    return edit.alignment.distance, f"{down:+.2f} pixels down, {right:+.2f} to the right"


def _scale(edit: CaseEdit) -> Measured:
    if edit.alignment is None:
        return _unaligned(edit)
    return abs(edit.alignment.scale - 1), f"{edit.alignment.scale:.2%} of the reference's size"


def _unaligned(edit: CaseEdit) -> Measured:
    if edit.expected.std(axis=(0, 1)).max() < 1:
        return None, "the reference's edit is flat and cannot be aligned; use a case with detail"
    return None, "the edit and the reference's have too little in common to be aligned; see psnr and ssim"


def _delta_e(edit: CaseEdit) -> Measured | None:
    if len(edit.case.images) > 1:  # whichever of them the edit is like
        return None
    height, width, _ = edit.expected.shape
    mask = untouched(np.asarray(resize(edit.case.images[-1], width, height)), edit.expected)
    if mask is None:
        return None
    detail = f"{mask.mean():.0%} of the pixels, which the reference leaves alone"
    return mean_delta_e(edit.image, edit.expected, mask), detail


def _drop(edit: CaseEdit) -> Measured | None:
    if edit.case.target is None:
        return None
    target = np.asarray(edit.case.target)
    reference, engines = psnr_db(edit.expected, target), psnr_db(edit.image, target)
    lost = 0.0 if reference == engines else reference - engines  # both may be infinite
    return lost, f"{engines:.2f} dB against the exact answer, the reference's edit {reference:.2f} dB"


def _size(image: np.ndarray) -> str:
    height, width, _ = image.shape
    return f"{width}x{height}"


def _spec(
    name: str, metric: str, unit: str, sense: Literal["at most", "at least"], measure: Measure, lacking: str = ""
) -> CheckSpec:
    return CheckSpec(
        level="edits",
        name=name,
        metric=metric,
        unit=unit,
        gate=f"gates.edits.{name}",
        sense=sense,
        run=partial(compared, measure=measure, lacking=lacking),
    )


SPECS = (
    CheckSpec(
        level="edits", name="psnr", metric="PSNR", unit="dB", gate="gates.edits.psnr", sense="at least", run=psnr
    ),
    _spec("ssim", "SSIM", "", "at least", _ssim),
    CheckSpec(
        level="edits", name="lpips", metric="LPIPS", unit="", gate="gates.edits.lpips", sense="at most", run=learned
    ),
    _spec("shift", "shift", "pixels", "at most", _shift),
    _spec("scale", "difference of the scale from 1", "", "at most", _scale),
    _spec(
        "delta_e",
        "mean CIEDE2000 where the reference changes nothing",
        "",
        "at most",
        _delta_e,
        f"the reference leaves less than {FEWEST:.0%} of every case with one image alone",
    ),
    _spec(
        "max_drop_db",
        "loss of PSNR against the exact answer",
        "dB",
        "at most",
        _drop,
        "no case of the golden file has an exact answer",
    ),
)
