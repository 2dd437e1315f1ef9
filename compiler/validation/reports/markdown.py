"""The report as GitHub's Markdown, for ``$GITHUB_STEP_SUMMARY`` and comments.

GitHub takes a summary of at most 1 MiB a step and shows none of a longer one
(https://docs.github.com/actions/reference/workflow-commands-for-github-actions), so rows and cells are limited.
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePath

from qie.compiler.validation.report import Bisection, Check, Report
from qie.compiler.validation.reports.words import (
    by_level,
    by_similarity,
    cases,
    clean,
    cosine_words,
    counts,
    facts,
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

__all__ = ["markdown"]

CHECKS, OPERATIONS, BISECTIONS, MEASUREMENTS = 50, 10, 5, 40
"""Rows that are shown of each kind."""

NAMES, LINES = 20, 40
"""Lines of a cell with names of checks, and of a fact."""

LONGEST, LONGEST_NAME = 300, 80
"""Characters of a reason, and of any other text."""

_ESCAPES = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_[]#~!"}
    | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "$": "&#36;", "@": "&#64;", "\t": " ", "\n": " "}
)


def markdown(report: Report) -> str:
    """The report as Markdown of less than 1 MiB, whatever is in it."""
    verdict = report.verdict
    name = PurePath(report.provenance.bundle).name or report.provenance.bundle
    parts = [
        f"## qie validate {_text(name)}, up to level {report.level}: {verdict}",
        f"**{_text(report.provenance.bundle)}**: {summary(report).partition(':')[0]}, in "
        f"{quantity(report.seconds, 's')}.",
    ]
    if report.provenance.rebuilt and report.provenance.ran is not None:
        parts.append(f"Ran {_text(report.provenance.ran, LONGEST)}, not the engines of the bundle.")
    outside = first_outside(report)
    if outside is not None:
        parts += [f"### First outside its tolerance: {_text(outside.component)}", _first(outside)]
    parts += [*_open(report), *_levels(report)]
    for bisection in report.bisections[:BISECTIONS]:
        parts += _bisection(bisection)
    parts += [*_measurements(report), *_facts(report)]
    return "\n\n".join(parts) + "\n"


def _open(report: Report) -> list[str]:
    """The checks that failed, then the reasons for which others did not run."""
    failed = [check for check in report.checks if check.result == "failed"]
    rows = [[*_cells(check), _text(check.detail, LONGEST)] for check in failed[:CHECKS]]
    header = ["level", "check", "case", "value", "gate", "found"]
    parts = ["### Failed", _table(header, rows, right=[3]), *_more(len(failed) - len(rows), "checks")] if failed else []
    groups = missing(report.checks)
    if groups:
        reasons = [[_names(group), _text(detail, LONGEST)] for detail, group in list(groups.items())[:CHECKS]]
        parts += ["### Not run", _table(["checks", "reason"], reasons), *_more(len(groups) - len(reasons), "reasons")]
    return parts or ([] if report.checks else ["No check ran."])


def _names(group: Sequence[Check]) -> str:
    """The checks in one cell."""
    names = [_text(f"{check.level}: {subject(check)}") for check in group[:NAMES]]
    return "<br>".join([*names, *_more(len(group) - len(names), "checks")])


def _cells(check: Check) -> list[str]:
    return _row((check,))


def _row(group: Sequence[Check]) -> list[str]:
    shown = worst(group)
    return [shown.level, _text(shown.name), _text(cases(group)), _text(value_words(shown)), str(shown.gate)]


def _levels(report: Report) -> list[str]:
    levels = by_level(report)
    if not levels:
        return []
    rows = [[level, *map(str, counts(checks).values())] for level, checks in levels.items()]
    passed = [row for checks in levels.values() for row in grouped(checks) if row[0].result == "passed"]
    shown = [_row(group) for group in passed[:CHECKS]]
    rest = sum(map(len, passed[CHECKS:]))
    table = _table(["level", "check", "case", "value", "gate"], shown, right=[3])
    return [
        "### Levels",
        _table(["level", "passed", "failed", "not run"], rows, right=[1, 2, 3]),
        *(_details("Passed", [table, *_more(rest, "checks")]) if shown else []),
    ]


def _bisection(bisection: Bisection) -> list[str]:
    shown = [
        [
            _text(op.name),
            cosine_words(op.similarity),
            number(op.relative_l2),
            number(op.tolerance),
            _text(op.source),
        ]
        for op in by_similarity(bisection)[:OPERATIONS]
    ]
    header = ["operation", "similarity", "relative L2", "tolerance", "source"]
    operations = [
        *([_table(header, shown, right=[1, 2, 3])] if shown else []),
        *_more(len(bisection.operations) - len(shown), "operations, which are more similar"),
    ]
    sound = bisection.first_block is None and bisection.first_operation is None
    return [
        f"### Bisected: {_text(bisection.component)}, case {_text(bisection.case)}",
        _first(bisection) or f"{_capital(_text(within(bisection), LONGEST))}.",
        *(_details("Operations", operations) if sound and shown else operations),
    ]


def _first(bisection: Bisection) -> str:
    """The first block and operation outside the tolerance; empty where there is none."""
    first = {"block": bisection.first_block, "operation": bisection.first_operation}
    found = [f"- First {kind} outside the tolerance: **{_text(where)}**" for kind, where in first.items() if where]
    operation = first_operation(bisection)
    if operation is not None:
        distance = f"relative L2 {number(operation.relative_l2)}, tolerance {number(operation.tolerance)}"
        found.append(f"- Found: {distance}, similarity {cosine_words(operation.similarity)}")
        found.append(f"- It reads: {_text(', '.join(operation.tensors) or 'no tensor', LONGEST)}")
        found.append(f"- It is written by: {_text(operation.source)}")
    return "\n".join(found)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _measurements(report: Report) -> list[str]:
    measured = report.measurements[:MEASUREMENTS]
    if not measured:
        return []
    rows = [
        [
            _text(m.name),
            _text(m.case or ""),
            _text(quantity(m.value, m.unit)),
            "" if m.planned is None else _text(quantity(m.planned, m.unit)),
        ]
        for m in measured
    ]
    table = _table(["measured", "case", "value", "planned"], rows, right=[2, 3])
    return _details("Measurements", [table, *_more(len(report.measurements) - len(rows), "measurements")])


def _facts(report: Report) -> list[str]:
    rows = [
        [name, "<br>".join(_text(line, LONGEST) for line in lines[:LINES]) + ("<br>…" if len(lines) > LINES else "")]
        for name, lines in facts(report).items()
    ]
    return _details("Provenance", [_table(["", ""], rows)])


def _details(title: str, parts: Iterable[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def _more(count: int, what: str) -> list[str]:
    return [f"… and {count} more {what}"] if count > 0 else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _text(text: str, longest: int = LONGEST_NAME) -> str:
    """``text`` in one line, cut where it is long, without what Markdown or HTML reads as markup."""
    whole = clean(text)
    cut = whole if len(whole) <= longest else whole[: longest - 1] + "…"
    return cut.translate(_ESCAPES).replace("://", "&#58;//")
