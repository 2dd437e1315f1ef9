"""The parts of the page below the checks: errors over steps, bisections, measurements, provenance."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from qie.compiler.validation.report import Bisection, Check, Measurement, Operation, Report
from qie.compiler.validation.reports.html.departure import departure, source
from qie.compiler.validation.reports.html.markup import breakable, element
from qie.compiler.validation.reports.html.plot import WIDE, axis, plot
from qie.compiler.validation.reports.words import by_similarity, cosine_words, facts, number, quantity, within

__all__ = ["bisections", "measurements", "provenance", "steps"]

SHOWN = 25
"""Operations of a bisection that are shown without opening the rest."""


def steps(report: Report) -> Element | None:
    """A plot for each check with values of steps; those of one check share an axis. None where there is none."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks:
        if check.steps:
            groups.setdefault((check.level, check.name), []).append(check)
    if not groups:
        return None
    legend = element(
        "p",
        "The dashed line is the gate, a diamond a step outside it. Only steps that the golden file holds are shown.",
        class_="muted",
    )
    plots = [_plots(name, group) for (_, name), group in groups.items()]
    return element("section", element("h2", "Error over steps"), legend, plots, id="steps")


def _plots(name: str, group: Sequence[Check]) -> list[Element]:
    scale = axis([value for check in group for value in (*check.steps, check.gate.bound)])
    figures = [
        element(
            "figure",
            element("figcaption", element("strong", check.case or "bundle"), f" {check.unit}".rstrip()),
            plot(
                check.steps,
                [check.gate.bound] * len(check.steps),
                title=f"{name}, {check.case or 'bundle'}",
                unit=f"{check.metric} {check.unit}".rstrip(),
                along="edit" if check.level == "edits" else "step",
                numbers=check.step_numbers,
                sense=check.gate.sense,
                scale=scale,
            ),
        )
        for check in group
    ]
    kind = f"{group[0].metric}, {'logarithmic' if scale.logarithmic else 'linear'} axis"
    return [
        element("h3", name, " ", element("span", kind, class_="muted")),
        element("div", figures, class_="plots"),
    ]


def bisections(report: Report) -> Element | None:
    """Where each component leaves the reference; None where nothing was bisected."""
    if not report.bisections:
        return None
    found = [_bisection(bisection) for bisection in report.bisections]
    return element("section", element("h2", "Bisection"), found, id="bisection")


def _bisection(bisection: Bisection) -> Element:
    operations = by_similarity(bisection)
    marked = {bisection.first_operation: "first operation"}
    header = [
        element("th", name, scope="col", class_="number" if place in (1, 2, 3) else None)
        for place, name in enumerate(("Operation", "Similarity", "Relative L2", "Tolerance", "Reads", "Source"))
    ]

    def table(rows: Sequence[Operation]) -> Element:
        lines = [_operation(op, bisection, marked.get(op.name)) for op in rows]
        inner = element("table", element("thead", element("tr", header)), element("tbody", lines), class_="operations")
        label = f"Operations of {bisection.component}"
        return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)

    title = element("h3", bisection.component)
    about = f"Case {bisection.case}, on {bisection.on}. The least similar operations come first."
    if bisection.first_block is None and bisection.first_operation is None:
        told = within(bisection)
        fold = element(
            "details",
            element("summary", f"{len(operations)} operations"),
            element("p", about, class_="muted"),
            _operations_plot(bisection),
            table(operations),
        )
        return element("section", title, element("p", f"{told[:1].upper()}{told[1:]}."), fold if operations else None)
    rest = operations[SHOWN:]
    return element(
        "section",
        title,
        element("p", about, class_="muted"),
        departure(bisection),
        _operations_plot(bisection),
        table(operations[:SHOWN]) if operations else None,
        element("details", element("summary", f"{len(rest)} more operations"), table(rest)) if rest else None,
    )


def _operations_plot(bisection: Bisection) -> Element | None:
    operations = bisection.operations
    if len(operations) < 2:
        return None
    values, bounds = [op.relative_l2 for op in operations], [op.tolerance for op in operations]
    title = f"Relative L2 of {bisection.component}'s operations in the order of the graph"
    scale = axis([*values, *bounds])
    drawn = plot(
        values,
        bounds,
        title=title,
        unit="relative L2",
        along="operation",
        sense="at most",
        scale=scale,
        width=WIDE,
    )
    scroll = element("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=title)
    return element("figure", element("figcaption", title), scroll, class_="wide")


def _operation(op: Operation, bisection: Bisection, mark: str | None) -> Element:
    in_block = op.block is not None and op.block == bisection.first_block
    marks = [element("span", mark, class_="pill failed")] if mark else []
    if in_block and not mark:
        marks = [element("span", "first block", class_="pill not-run")]
    outside = not op.relative_l2 <= op.tolerance
    return element(
        "tr",
        element("td", element("code", breakable(op.name)), " ", marks),
        element("td", cosine_words(op.similarity), class_="number"),
        element("td", number(op.relative_l2), class_="number outside" if outside else "number"),
        element("td", number(op.tolerance), class_="number"),
        element("td", breakable(", ".join(op.tensors))),
        element("td", source(op)),
        class_="first-operation" if mark else "first-block" if in_block else None,
    )


def measurements(report: Report) -> Element | None:
    """Figures without a gate beside what was planned; None where nothing was measured."""
    if not report.measurements:
        return None
    names = ("Measured", "Case", "Value", "Planned", "Of planned")
    header = [element("th", n, scope="col", class_="number" if p > 1 else None) for p, n in enumerate(names)]
    rows = [_measurement(measurement) for measurement in report.measurements]
    table = element("table", element("thead", element("tr", header)), element("tbody", rows), class_="figures")
    scroll = element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Measurements")
    return element("section", element("h2", "Measurements"), scroll, id="measurements")


def _measurement(measured: Measurement) -> Element:
    planned, ratio = "–", "–"
    if measured.planned is not None:
        planned = quantity(measured.planned, measured.unit)
        ratio = f"{number(100 * measured.value / measured.planned)}%" if measured.planned else "–"
    return element(
        "tr",
        element("td", measured.name),
        element("td", measured.case or element("span", "bundle", class_="muted")),
        element("td", quantity(measured.value, measured.unit), class_="number"),
        element("td", planned, class_="number"),
        element("td", ratio, class_="number"),
    )


def provenance(report: Report) -> Element:
    """What was validated, against what, where and with which packages."""
    rows = [
        element("div", element("dt", name), [element("dd", line) for line in lines])
        for name, lines in facts(report).items()
    ]
    return element("section", element("h2", "Provenance"), element("dl", rows, class_="facts"), id="provenance")
