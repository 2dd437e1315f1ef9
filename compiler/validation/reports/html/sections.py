"""The parts of the page that show checks: levels at a glance, and a table for each."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from qie.compiler.validation.report import LEVELS, Check, Inapplicable, Level, Report
from qie.compiler.validation.reports.html.departure import cause
from qie.compiler.validation.reports.html.images import links
from qie.compiler.validation.reports.html.markup import Child, breakable, element, prose
from qie.compiler.validation.reports.words import (
    by_level,
    cases,
    counts,
    finding,
    first_outside,
    grouped,
    missing,
    subject,
    value_words,
    worst,
)

__all__ = ["checks", "levels", "open_checks", "pill"]

LEVEL_TITLES: dict[Level, str] = {
    "structure": "Structure",
    "components": "Components",
    "trajectory": "Trajectory",
    "edits": "Edits",
}

LEVEL_QUESTIONS: dict[Level, str] = {
    "structure": "What the files of the bundle and the engines say of themselves.",
    "components": "Each component alone, on the reference's inputs.",
    "trajectory": "Each denoising step, from the reference's latents.",
    "edits": "Whole edits, from the reference's noise.",
}

BAR_WIDTH, BAR_GATE = 120, 80
"""Width of a bar and the place of its gate in it, in units of the drawing."""


def pill(result: str) -> Element:
    """A result as a word on its color."""
    return element("span", result, class_=f"pill {result.replace(' ', '-')}")


def levels(report: Report) -> Element:
    """A link for each level with the counts of its results."""
    groups = by_level(report)
    return element("ul", [_at_a_glance(level, groups.get(level, ())) for level in LEVELS], class_="levels")


def _at_a_glance(level: Level, group: Sequence[Check]) -> Element:
    if not group:
        told: Child = element("span", "no checks", class_="muted")
        return element("li", element("span", LEVEL_TITLES[level], class_="name"), told, class_="none")
    numbers = counts(group)
    parts = [element("span", f"{n} {result}", class_=result.replace(" ", "-")) for result, n in numbers.items() if n]
    shares, start = [], 0.0
    for result, n in numbers.items():
        if n:
            share = 100 * n / len(group)
            shares.append(element("rect", class_=result.replace(" ", "-"), x=start, y=0, width=share, height=6))
            start += share
    bar = element("svg", shares, viewBox="0 0 100 6", preserveAspectRatio="none", aria_hidden="true", class_="share")
    name = element("a", LEVEL_TITLES[level], href=f"#level-{level}", class_="name")
    return element("li", name, bar, element("span", parts, class_="counts"))


def open_checks(report: Report) -> Element | None:
    """What failed and what did not run, with the reasons; None where there is no such check."""
    failed = [check for check in report.checks if check.result == "failed"]
    groups = missing(report.checks)
    shown = links(report)
    outside = first_outside(report)
    items = [] if outside is None else [cause(outside)]
    items += [
        *(_failure(check, shown) for check in failed),
        *(_absence(detail, group) for detail, group in groups.items()),
    ]
    if not items:
        return None
    return element(
        "section",
        element("h2", "Needs attention"),
        element("ul", items, class_="reasons"),
        id="attention",
    )


def _failure(check: Check, shown: Mapping[str, str]) -> Element:
    title = element("p", pill("failed"), " ", element("strong", subject(check)), " ", _where([check]))
    link = shown.get(check.case or "")
    images = element("a", "its images", href=link) if link else None
    found = element("p", finding(check), " ", images)
    return element("li", title, found, element("p", prose(check.detail), class_="detail"))


def _absence(detail: str, group: Sequence[Check]) -> Element:
    names = element("span", ", ".join(map(subject, group)))
    title = element("p", pill("not run"), " ", names, " ", _where(group))
    return element("li", title, element("p", prose(detail), class_="detail"))


def _where(group: Sequence[Check]) -> Element:
    """The levels of some checks."""
    names = dict.fromkeys(LEVEL_TITLES[check.level] for check in group)
    return element("span", ", ".join(names), class_="muted")


def checks(report: Report) -> list[Element]:
    """A section for each level that has checks."""
    return [
        _level(level, group, [absent for absent in report.inapplicable if absent.level == level], links(report))
        for level, group in by_level(report).items()
    ]


def _level(
    level: Level, group: Sequence[Check], inapplicable: Sequence[Inapplicable], shown: Mapping[str, str]
) -> Element:
    places = Counter(check.on for check in group if check.on)
    usual = places.most_common(1)[0][0] if places else ""
    told = f" Ran on {usual}{', except where stated' if len(places) > 1 else ''}." if usual else None
    cells = [element("th", name, scope="col") for name in ("Check", "Case", "Value", "Gate")]
    cells += [element("th", "Value to gate", scope="col", class_="bar"), element("th", "Result", scope="col")]
    return element(
        "section",
        element("h3", LEVEL_TITLES[level]),
        element("p", LEVEL_QUESTIONS[level], told, class_="muted"),
        element(
            "table",
            element("thead", element("tr", cells, role="row"), role="rowgroup"),
            element("tbody", [_row(row, usual, shown) for row in grouped(group)], role="rowgroup"),
            class_="checks",
            role="table",
            aria_label=f"Checks of level {level}",
        ),
        [
            element("p", "Does not apply: ", element("strong", absent.name), f", {absent.reason}.", class_="muted")
            for absent in inapplicable
        ],
        id=f"level-{level}",
    )


def _row(group: Sequence[Check], usual: str, shown: Mapping[str, str]) -> Element:
    check = worst(group)
    detail = None if check.result == "not run" or len(group) > 1 else check.detail  # the reason is above, once for all
    notes = [check.metric, f"on {check.on}" if check.on not in ("", usual) else ""]
    gate = element("code", breakable(check.gate.key)) if check.gate.key else "fixed"
    case = _case(check, shown) if len(group) == 1 else cases(group)
    return element(
        "tr",
        element(
            "td",
            element("strong", check.name),
            element("span", ", ".join(filter(None, notes)), class_="muted metric"),
            element("p", prose(detail), class_="detail") if detail else None,
            _fold(group, shown) if len(group) > 1 else None,
            role="cell",
        ),
        element("td", case, role="cell", data_label="Case"),
        element("td", value_words(check), role="cell", data_label="Value", class_="number"),
        element(
            "td",
            element("span", str(check.gate)),
            element("small", gate),
            role="cell",
            data_label="Gate",
            class_="gate",
        ),
        element("td", bar(check), role="cell", class_="bar", aria_hidden="true"),
        element("td", pill(check.result), role="cell", class_="result"),
        role="row",
        class_=check.result.replace(" ", "-"),
    )


def _case(check: Check, shown: Mapping[str, str]) -> Child:
    """The case of a check, which leads to its images where it has any."""
    if check.case is None:
        return element("span", "bundle", class_="muted")
    return element("a", check.case, href=shown[check.case]) if check.case in shown else check.case


def _fold(group: Sequence[Check], shown: Mapping[str, str]) -> Element:
    """Every case of a row with its value and what was found."""
    found = [
        element(
            "li",
            _case(check, shown),
            " ",
            value_words(check),
            " ",
            element("span", prose(check.detail), class_="muted"),
        )
        for check in group
    ]
    return element("details", element("summary", f"all {len(group)}"), element("ul", found), class_="cases")


def bar(check: Check) -> Element | None:
    """The value as a bar on the range that its gate allows; None where it did not run."""
    if check.value is None:
        return None
    gate = check.gate
    place = float(BAR_GATE if gate.bound > 0 else 2)
    if math.isnan(check.value):
        length = 0.0
    elif gate.bound > 0:
        length = min(max(check.value / gate.bound * place, 0.0), float(BAR_WIDTH))
    else:
        length = float(BAR_WIDTH) if check.value > gate.bound else place
    low, high = (0.0, place) if gate.sense == "at most" else (place, float(BAR_WIDTH))
    return element(
        "svg",
        element("rect", class_="track", x=0, y=4, width=BAR_WIDTH, height=8, rx=2),
        element("rect", class_="allowed", x=low, y=4, width=high - low, height=8, rx=2),
        element("rect", class_=f"fill {check.result}", x=0, y=6, width=max(length, 1.5), height=4, rx=2),
        element("line", class_="mark", x1=place, x2=place, y1=1, y2=15),
        viewBox=f"0 0 {BAR_WIDTH} 16",
        aria_hidden="true",
        class_="meter",
    )
