"""How far the velocities of two bundles are apart, step by step along the reference's trajectory."""

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qie.compiler.metrics.error import relative_l2
from qie.compiler.validation.golden.file import Golden
from qie.compiler.validation.subject import Executed
from qie.compiler.validation.teacher_forcing import StepVelocities, velocities
from qie.engines.bundle.bundle import Bundle
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.choose import choose_engines

__all__ = ["StepDistance", "diff_velocities"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDistance:
    """The distances of one pass of one step; None is one that is not finite.

    Attributes:
        case: of the golden file.
        step: number of the step, from 0.
        sigma: of the step.
        passed: the pass with the instruction, or with the negative prompt.
        between: relative L2 of the new velocity to the old one.
        old, new: relative L2 of either to the reference's.
    """

    case: str
    step: int
    sigma: float
    passed: Literal["conditional", "negative"]
    between: float | None
    old: float | None
    new: float | None


def diff_velocities(
    old: Bundle, new: Bundle, golden: Golden, *, device: int | None = None, progress: StageProgress = no_progress
) -> tuple[StepDistance, ...]:
    """Run the recorded steps of every case with both bundles, one bundle after the other.

    Args:
        old: bundle that this machine can run, of the model of ``golden``.
        new: another such bundle.
        golden: the reference.
        device: CUDA index of the GPU; None for the first that fits.
        progress: called with (cases run, cases to run).

    Raises:
        EngineMismatchError, BackendMissingError, BundleError: this machine cannot run a bundle.
        EngineError: a backend failed or memory ran out.
    """
    runs: list[list[list[StepVelocities]]] = []
    for number, bundle in enumerate((old, new)):
        engines = choose_engines(bundle, device)
        with closing(Executed.of(bundle, engines, on="", rebuilt=False, device=device)) as executed:
            steps = []
            for index, case in enumerate(golden.cases):
                progress(number * len(golden.cases) + index, 2 * len(golden.cases))
                steps.append(velocities(executed, case))
            runs.append(steps)
    progress(2 * len(golden.cases), 2 * len(golden.cases))
    found: list[StepDistance] = []
    for case, before, after in zip(golden.cases, *runs, strict=True):
        for index, (a, b) in enumerate(zip(before, after, strict=True)):
            found.append(_distance(case.record.name, "conditional", a, a.velocity, b.velocity, case.velocity[index]))
            if a.negative_velocity is not None and b.negative_velocity is not None:
                assert case.negative_velocity is not None
                pair = a.negative_velocity, b.negative_velocity
                found.append(_distance(case.record.name, "negative", a, *pair, case.negative_velocity[index]))
    return tuple(found)


def _distance(
    case: str,
    passed: Literal["conditional", "negative"],
    step: StepVelocities,
    old: Floats,
    new: Floats,
    reference: Floats,
) -> StepDistance:
    return StepDistance(
        case=case,
        step=step.step,
        sigma=step.sigma,
        passed=passed,
        between=_finite(new, old),
        old=_finite(old, reference),
        new=_finite(new, reference),
    )


def _finite(values: Floats, expected: Floats) -> float | None:
    if not expected.any():
        return None
    found = relative_l2(values, expected)
    return found if math.isfinite(found) else None
