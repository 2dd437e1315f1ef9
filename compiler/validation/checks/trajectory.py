"""Trajectory: every recorded step from the reference's latents, and the blocks of one run."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from qie.compiler.metrics.error import relative_l2
from qie.compiler.validation.bisect import bisectable, bisection
from qie.compiler.validation.checks.check import CheckSpec, Finding, NotApplicable, Outcome, for_cases, not_computed
from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed, Subject
from qie.compiler.validation.teacher_forcing import forced

__all__ = ["SPECS"]


def velocity(executed: Executed, case: GoldenCase) -> Finding:
    """The velocity of every recorded step, of the pass that is further from the reference's."""
    errors = []
    for number, step in enumerate(forced(executed, case)):
        passes = [relative_l2(step.velocity, case.velocity[number])]
        if step.negative_velocity is not None and case.negative_velocity is not None:
            passes.append(relative_l2(step.negative_velocity, case.negative_velocity[number]))
        errors.append(float(np.max(passes)))
    return _worst(errors, case, executed)


def latents(executed: Executed, case: GoldenCase) -> Finding:
    """The change of the latents in every recorded step: guidance, its rescale and the Euler step."""
    errors = [
        relative_l2(step.latents_next - case.latents[number], case.latents_next[number] - case.latents[number])
        for number, step in enumerate(forced(executed, case))
    ]
    return _worst(errors, case, executed)


def _worst(errors: Sequence[float], case: GoldenCase, executed: Executed) -> Finding:
    worst, recorded = int(np.argmax(errors)), case.record.recorded
    return Finding(
        value=float(np.max(errors)),
        case=case.record.name,
        on=executed.on,
        detail=f"worst at step {recorded[worst] + 1}, of {len(errors)} recorded",
        steps=errors,
        step_numbers=[step + 1 for step in recorded],
    )


def blocks(subject: Subject) -> Iterator[Outcome]:
    """The output of every operation and block of every component that runs as a graph, in one run."""
    if subject.golden is None or subject.executed is None:
        yield Finding(value=None, detail=subject.obstacle or "")
        return
    components = bisectable(subject.executed, subject.golden)
    if not components:
        yield NotApplicable(reason="compiled engines have no blocks; the backend onnxruntime runs their graphs")
    for number, component in enumerate(components):
        subject.progress(number, len(components))
        try:
            found = bisection(subject, component)
        except Exception as problem:  # of whatever kind: the other components run
            detail = not_computed(problem)
            yield Finding(value=math.nan, case=component, on=subject.executed.on, detail=detail)
            continue
        if found.lacking or not found.operations:
            lacking = f", such as {found.lacking[0]}" if found.lacking else ""
            detail = f"the graph lacks {len(found.lacking)} modules of the golden file{lacking}"
            yield Finding(value=math.inf, case=component, on=found.on, detail=detail)
            continue
        errors = [operation.relative_l2 for operation in found.operations]
        inside = sum(operation.whole_block for operation in found.operations)
        worst = found.operations[int(np.argmax(errors))].name
        detail = f"{len(errors)} operations, {inside} of them blocks, worst {worst}"
        if found.first_block is not None:
            detail = f"{found.first_block} is the first block outside the gate"
            if found.first_operation is not None:
                detail += f", {found.first_operation} the first operation"
        elif found.first_operation is not None:
            detail = f"{found.first_operation} is the first operation outside the gate, all blocks are within it"
        yield Finding(value=float(np.max(errors)), case=component, on=found.on, detail=detail)


SPECS = (
    CheckSpec(
        level="trajectory",
        name="velocity",
        metric="relative L2",
        unit="",
        gate="gates.trajectory.velocity",
        sense="at most",
        run=for_cases(velocity),
    ),
    CheckSpec(
        level="trajectory",
        name="latents",
        metric="relative L2 of the step",
        unit="",
        gate="gates.trajectory.latents",
        sense="at most",
        run=for_cases(latents),
    ),
    CheckSpec(
        level="trajectory",
        name="blocks",
        metric="relative L2",
        unit="",
        gate="gates.trajectory.block",
        sense="at most",
        run=blocks,
    ),
)
