"""Edits: the largest edit takes no more memory than the plan said when the bundle was built."""

import math
from collections.abc import Iterator

from qie.compiler.validation.checks.check import CheckSpec, Finding, Outcome
from qie.compiler.validation.measure import measured_peak
from qie.compiler.validation.report import Measurement
from qie.compiler.validation.subject import Subject
from qie.engines.errors import BackendMissingError, EngineError
from qie.engines.machine import GIB, this_machine
from qie.engines.sessions.choose import choose_engines

__all__ = ["SPECS"]


def memory(subject: Subject) -> Iterator[Outcome]:
    """Peak memory of the largest edit in a new process, as a multiple of the plan's."""
    executed, planned = subject.executed, subject.bundle.manifest.planned_bytes
    obstacle = _obstacle(subject, planned)
    if executed is None or planned is None or obstacle is not None:
        yield Finding(value=None, detail=obstacle or "", on="" if executed is None else executed.on)
        return
    try:
        measured = measured_peak(executed.bundle.path, executed.device)
    except BackendMissingError as problem:
        yield Finding(value=None, detail=str(problem), on=executed.on)
        return
    except EngineError as problem:
        yield Finding(value=math.nan, detail=f"the largest edit failed: {problem}", on=executed.on)
        return
    detail = f"{measured / 1e6:,.0f} MB in the largest edit that the recipe allows, planned {planned / 1e6:,.0f} MB"
    yield Finding(value=measured / planned, detail=detail, on=executed.on)
    yield Measurement(name="peak memory", case=None, value=measured, unit="bytes", planned=planned)


def _obstacle(subject: Subject, planned: int | None) -> str | None:
    """Why the largest edit is not run, and what to do."""
    if subject.executed is None:
        return subject.not_executed
    if subject.executed.rebuilt:
        return "other engines run here than those that the plan is about; run it on the machine that they are built for"
    chosen = choose_engines(subject.bundle, subject.executed.device)
    if subject.executed.stages.engines != chosen:
        return "the engines of one backend were chosen, and the plan is about those that run by themselves; choose none"
    if not planned:
        return "the bundle does not say what memory was planned; build the bundle again with `qie build`"
    on_cpu = all(engine.compute_capability == "cpu" for engine, *_ in subject.executed.stages.engines.values())
    memory_gib = this_machine().memory_gib
    if on_cpu and planned > memory_gib * GIB:
        return (
            f"the largest edit is planned with {planned / GIB:.1f} GiB, and this machine has {memory_gib:.1f}; run it "
            "on a machine with more, or lower shapes.references.max in the recipe"
        )
    return None


SPECS = (
    CheckSpec(
        level="edits",
        name="memory",
        metric="peak memory over the plan's",
        unit="",
        gate="gates.edits.memory",
        sense="at most",
        run=memory,
    ),
)
