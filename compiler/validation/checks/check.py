"""What every check is written with: its declaration, its findings, and the verdict that a gate gives."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qie.compiler.validation.report import Check, Gate, Level, Measurement, Pictures
from qie.compiler.validation.subject import Subject

__all__ = ["NONE_ALLOWED", "CheckSpec", "Finding", "Outcome", "judged"]

NONE_ALLOWED = Gate(key=None, sense="at most", bound=0)
"""The gate of a check that counts what must not be; no recipe changes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a check found, before its gate judges it.

    Attributes:
        value: None where the check could not run.
        detail: what was found; where there is no value, why, a semicolon, and what to do.
        case: of the golden file; None for the bundle.
        on: what executed; empty where nothing did.
        steps: values of each step, where there are such.
        seconds: that it took, where the check measures it itself; None for the time until it was yielded.
    """

    value: float | None
    detail: str
    case: str | None = None
    on: str = ""
    steps: Sequence[float] = ()
    seconds: float | None = None


Outcome = Finding | Measurement | Pictures
"""What a check yields: findings that are judged, and what the report shows beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckSpec:
    """A check: a name, what it measures, its gate, and the function that finds the values.

    Attributes:
        level: that it belongs to.
        name: unique in its level.
        metric: what the value is.
        unit: of the value.
        gate: key of the recipe whose bound the value must meet; None for a count that must be 0.
        sense: on which side of the bound the value must be.
        run: yields the findings of a bundle; whatever it raises makes the check fail.
    """

    level: Level
    name: str
    metric: str
    unit: str
    gate: str | None
    sense: Literal["at most", "at least"]
    run: Callable[[Subject], Iterator[Outcome]]


def judged(spec: CheckSpec, finding: Finding, gate: Gate, seconds: float) -> Check:
    """``finding`` with the verdict of ``gate``."""
    value = finding.value
    return Check(
        level=spec.level,
        name=spec.name,
        case=finding.case,
        on=finding.on,
        metric=spec.metric,
        unit=spec.unit,
        value=value,
        gate=gate,
        result="not run" if value is None else "passed" if gate.holds(value) else "failed",
        detail=finding.detail,
        seconds=seconds if finding.seconds is None else finding.seconds,
        steps=tuple(finding.steps),
    )
