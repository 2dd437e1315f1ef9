"""What a plan says about its calibration, for the commands that print plans."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qie.engines.terminal import human_memory, human_seconds, printable, wrap

if TYPE_CHECKING:
    from qie.compiler.planning.calibration import PlannedCalibration
    from qie.compiler.planning.plan import Plan

__all__ = ["calibration_facts", "calibration_lines"]


def calibration_lines(
    plan: "Plan", made: "PlannedCalibration | None" = None, *, images: Path | None = None
) -> list[str]:
    """Where the scales come from: nothing for a plan that does not quantize.

    ``made`` is what ``planned_calibration`` says of ``plan``, where that is known already; ``images`` are those that a
    calibration is made of, None for the built-in ones.
    """
    if not plan.recipe.quantizes:
        return []
    if plan.calibration is not None:
        return [f"calibration: {plan.calibration.source}"]
    from qie.compiler.planning.calibration import planned_calibration

    made = made or planned_calibration(plan)
    assert made is not None
    cores = f"{made.cores} core{'s' if made.cores > 1 else ''}"
    time = f"about {human_seconds(made.seconds)}" if made.seconds >= 10 else "a few seconds"
    source = "the built-in images" if images is None else printable(str(images))
    return [
        wrap(
            f"calibration: {made.samples} samples of {source} at {made.size}, {time} on {cores}, "
            f"about {human_memory(made.memory.bytes)} of host memory; an earlier build's is used where it is the same"
        )
    ]


def calibration_facts(plan: "Plan", made: "PlannedCalibration | None" = None) -> dict[str, Any] | None:
    """The same as JSON data; None for a plan that does not quantize."""
    if not plan.recipe.quantizes:
        return None
    from qie.compiler.planning.calibration import planned_calibration

    made = made or planned_calibration(plan)
    if made is None:
        assert plan.calibration is not None
        return {"file": str(plan.calibration.source)}
    return {
        "samples": made.samples,
        "width": made.size.width,
        "height": made.size.height,
        "flops": made.flops,
        "seconds": made.seconds,
        "host_bytes": made.memory.bytes,
    }
