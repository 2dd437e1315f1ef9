"""What every check is written with: its declaration, its findings, and the verdict that a gate gives."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.report import CaseImages, Check, Gate, Level, Measurement
from qie.compiler.validation.subject import Executed, Subject
from qie.engines.errors import QieError, RequestError, first_line

__all__ = [
    "NONE_ALLOWED",
    "CheckSpec",
    "Finding",
    "NotApplicable",
    "Outcome",
    "counted",
    "for_cases",
    "judged",
    "not_computed",
    "not_taken",
]

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
        step_numbers: number of each step, from 1.
        seconds: that it took, where the check measures it itself; None for the time until it was yielded.
    """

    value: float | None
    detail: str
    case: str | None = None
    on: str = ""
    steps: Sequence[float] = ()
    step_numbers: Sequence[int] = ()
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NotApplicable:
    """What a check yields in place of a finding where the bundle, or what executes, has nothing that it could judge."""

    reason: str


Outcome = Finding | NotApplicable | Measurement | CaseImages
"""What a check yields: findings to judge, or that there is nothing to judge, and what the report shows beside them."""


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
        run: yields the findings of a bundle, at least one or ``NotApplicable``; what it raises makes the check fail.
    """

    level: Level
    name: str
    metric: str
    unit: str
    gate: str | None
    sense: Literal["at most", "at least"]
    run: Callable[[Subject], Iterator[Outcome]]


def counted(problems: Sequence[str], fine: str, *, case: str | None = None, on: str = "") -> Finding:
    """The number of ``problems``, which must be 0, with the first of them or, where there is none, with ``fine``."""
    if not problems:
        return Finding(value=0, detail=fine, case=case, on=on)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Finding(value=len(problems), detail=f"{problems[0]}{more}", case=case, on=on)


def not_taken(problem: RequestError) -> str:
    """Why a case is not run: the bundle does not take it."""
    return f"the bundle does not take this case: {problem}"


def not_computed(problem: Exception) -> str:
    """Why a check has failed that raised ``problem``."""
    text = str(problem) if isinstance(problem, QieError) else f"{type(problem).__name__}: {first_line(problem)}"
    return f"it could not be computed: {text}"


def for_cases(find: Callable[[Executed, GoldenCase], Finding]) -> Callable[[Subject], Iterator[Outcome]]:
    """A check that calls ``find`` with what runs and each case of the golden file; where it cannot, it is not run."""
    return partial(_for_cases, find=find)


def _for_cases(subject: Subject, *, find: Callable[[Executed, GoldenCase], Finding]) -> Iterator[Outcome]:
    if subject.golden is None or subject.executed is None:
        yield Finding(value=None, detail=subject.obstacle or "")
        return
    cases, on = subject.golden.cases, subject.executed.on
    for number, case in enumerate(cases):
        subject.progress(number, len(cases))
        try:
            yield find(subject.executed, case)
        except RequestError as problem:
            yield Finding(value=None, detail=not_taken(problem), case=case.record.name, on=on)
        except Exception as problem:  # of whatever kind: the other cases run
            yield Finding(value=math.nan, detail=not_computed(problem), case=case.record.name, on=on)


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
        step_numbers=tuple(finding.step_numbers),
    )
