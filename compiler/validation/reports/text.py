"""The report for a terminal: a table a level, the reasons below it, what was bisected, and one line of verdict."""

from qie.compiler.validation.report import Bisection, Check, Report
from qie.compiler.validation.reports.words import (
    by_level,
    by_similarity,
    clean,
    missing,
    number,
    quantity,
    subject,
    summary,
    value_words,
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
    if report.provenance.ran is not None:
        parts.append(wrap(clean(f"ran {report.provenance.ran}, not the engines of the bundle")))
    return "\n\n".join([*parts, summary(report)])


def _level(level: str, checks: tuple[Check, ...]) -> str:
    rows = [
        [clean(check.name), clean(check.case or ""), value_words(check), str(check.gate), check.result]
        for check in checks
    ]
    shown = table(rows, header=[level, "case", "value", "gate", "result"], right=[2])
    reasons = [
        wrap(f"{subject(check)}: {clean(check.metric)}; {clean(check.detail)}".removesuffix("; "), indent=2)
        for check in checks
        if check.result == "failed"
    ]
    for detail, group in missing(checks).items():
        reasons.append(wrap(f"{', '.join(map(subject, group))}: {clean(detail)}", indent=2))
    return "\n".join([shown, *(["", *reasons] if reasons else [])])


def _bisection(bisection: Bisection) -> str:
    name, case, on = clean(bisection.component), clean(bisection.case), clean(bisection.on)
    if bisection.first_operation is None and bisection.first_block is None:
        finding = f"all {len(bisection.operations)} operations are within their tolerance"
    else:
        first = [("block", bisection.first_block), ("operation", bisection.first_operation)]
        found = [f"the first {kind} outside the tolerance is {clean(where)}" for kind, where in first if where]
        finding = ", ".join(found)
    rows = [
        [number(op.similarity), number(op.relative_l2), number(op.tolerance), clean(op.name), clean(op.source)]
        for op in by_similarity(bisection)[:HEAD]
    ]
    header = ["similarity", "relative L2", "tolerance", "operation", "source"]
    more = len(bisection.operations) - len(rows)
    lines = [wrap(f"bisected {name} with {case} on {on}: {finding}"), table(rows, header=header, right=[0, 1, 2])]
    return "\n".join([*lines, *([f"and {more} more similar ones"] if more else [])])


def _measurements(report: Report) -> str:
    rows = [
        [
            clean(m.name),
            clean(m.case or ""),
            quantity(m.value, m.unit),
            "" if m.planned is None else quantity(m.planned, m.unit),
        ]
        for m in report.measurements
    ]
    return table(rows, header=["measured", "case", "value", "planned"], right=[2, 3])
