"""The report for a terminal: a table a level, the reasons below it, what was bisected, and one line of verdict."""

from collections.abc import Sequence

from qie.compiler.validation.report import Bisection, Check, Measurement, Report
from qie.compiler.validation.reports.words import (
    by_level,
    by_similarity,
    cases,
    clean,
    cosine_words,
    finding,
    first_operation,
    first_outside,
    grouped,
    missing,
    number,
    quantity,
    subject,
    summary,
    value_words,
    within,
    worst,
)
from qie.engines.terminal import table, wrap

__all__ = ["text"]

HEAD = 10
"""Operations of a bisection that are shown."""


def text(report: Report) -> str:
    """The report as lines of text without a line feed at the end, as wide as the terminal."""
    parts = [_level(level, checks) for level, checks in by_level(report).items()]
    parts += [_bisection(bisection) for bisection in report.bisections]
    if report.measurements:
        parts.append(_measurements(report))
    if report.inapplicable:
        absent = (f"{clean(check.name)} ({clean(check.reason)})" for check in report.inapplicable)
        parts.append(wrap(f"does not apply: {', '.join(absent)}"))
    if report.provenance.rebuilt and report.provenance.ran is not None:
        parts.append(wrap(clean(f"ran {report.provenance.ran}, not the engines of the bundle")))
    outside = first_outside(report)
    if outside is not None:
        parts.append(_first_outside(outside))
    return "\n\n".join([*parts, summary(report)])


def _level(level: str, checks: tuple[Check, ...]) -> str:
    rows = [_row(group) for group in grouped(checks)]
    shown = table(rows, header=[level, "case", "value", "gate", "result"], right=[2])
    reasons = [
        wrap(f"{subject(check)}: {finding(check)}; {clean(check.detail)}".removesuffix("; "), indent=2)
        for check in checks
        if check.result == "failed"
    ]
    for detail, group in missing(checks).items():
        reasons.append(wrap(f"{', '.join(map(subject, group))}: {clean(detail)}", indent=2))
    return "\n".join([shown, *(["", *reasons] if reasons else [])])


def _row(group: Sequence[Check]) -> list[str]:
    """A line of the table; of several checks the value that is nearest to the gate."""
    shown = worst(group)
    return [clean(shown.name), cases(group), value_words(shown), str(shown.gate), shown.result]


def _bisection(bisection: Bisection) -> str:
    name, case, on = clean(bisection.component), clean(bisection.case), clean(bisection.on)
    if bisection.first_operation is None and bisection.first_block is None:
        return wrap(f"bisected {name} with {case} on {on}: {within(bisection)}")
    first = [("block", bisection.first_block), ("operation", bisection.first_operation)]
    finding = ", ".join(f"the first {kind} outside the tolerance is {clean(where)}" for kind, where in first if where)
    rows = [
        [cosine_words(op.similarity), number(op.relative_l2), number(op.tolerance), clean(op.name), clean(op.source)]
        for op in by_similarity(bisection)[:HEAD]
    ]
    header = ["similarity", "relative L2", "tolerance", "operation", "source"]
    more = len(bisection.operations) - len(rows)
    lines = [wrap(f"bisected {name} with {case} on {on}: {finding}")]
    operation = first_operation(bisection)
    if operation is not None:
        lines.append(wrap(f"it reads {clean(', '.join(operation.tensors)) or 'no tensor'}", indent=2))
        lines.append(wrap(f"it is written by {clean(operation.source)}", indent=2))
    lines.append(table(rows, header=header, right=[0, 1, 2]))
    return "\n".join([*lines, *([f"and {more} more similar ones"] if more else [])])


def _first_outside(bisection: Bisection) -> str:
    """Where to look first, which is told last."""
    name = clean(bisection.first_operation or bisection.first_block or "")
    line = f"first outside its tolerance: {name} of {bisection.component}"
    operation = first_operation(bisection)
    if operation is None:
        return wrap(line)
    distance = f"relative L2 {number(operation.relative_l2)}, tolerance {number(operation.tolerance)}"
    reads = f"reads {clean(', '.join(operation.tensors)) or 'no tensor'}"
    where = "" if bisection.first_block is None else f"; the first block is {clean(bisection.first_block)}"
    lines = [wrap(f"{line}, written by {clean(operation.source)}"), wrap(f"{distance}; it {reads}{where}", indent=2)]
    return "\n".join(lines)


def _measurements(report: Report) -> str:
    """The seconds of the stages, a line a case, and every other figure in a line of its own."""
    staged = [m for m in report.measurements if m.unit == "s" and m.case is not None and m.planned is None]
    others = [m for m in report.measurements if m not in staged]
    parts = []
    if staged:
        stages = list(dict.fromkeys(m.name for m in staged))
        found = {(m.case, m.name): quantity(m.value, m.unit) for m in staged}
        rows = [[clean(case or ""), *(found.get((case, stage), "") for stage in stages)] for case in _cases(staged)]
        parts.append(table(rows, header=["time of", *map(clean, stages)], right=range(1, len(stages) + 1)))
    if others:
        rows = [[clean(m.name), clean(m.case or ""), quantity(m.value, m.unit), _planned(m)] for m in others]
        parts.append(table(rows, header=["measured", "case", "value", "planned"], right=[2, 3]))
    return "\n\n".join(parts)


def _cases(measurements: list[Measurement]) -> list[str | None]:
    return list(dict.fromkeys(m.case for m in measurements))


def _planned(measurement: Measurement) -> str:
    return "" if measurement.planned is None else quantity(measurement.planned, measurement.unit)
