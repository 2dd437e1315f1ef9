"""The page: its head, the verdict, and the sections in the order in which they are asked for."""

from importlib import resources
from pathlib import PurePath
from xml.etree.ElementTree import Element

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.html.details import bisections, measurements, provenance, steps
from qie.compiler.validation.reports.html.images import images
from qie.compiler.validation.reports.html.markup import document, element
from qie.compiler.validation.reports.html.sections import checks, levels, open_checks
from qie.compiler.validation.reports.words import counts, quantity, ran

__all__ = ["html"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is loaded and no script runs, whatever the data of the report hold."""

STYLE = "style.css"


def html(report: Report) -> str:
    """The report as one page: no script, no network, every text of the data escaped."""
    sections = [
        open_checks(report),
        element("section", element("h2", "Checks"), checks(report), id="checks") if report.checks else None,
        images(report),
        steps(report),
        bisections(report),
        measurements(report),
        provenance(report),
    ]
    shown = [section for section in sections if section is not None]
    body = element("body", _header(report), element("main", _contents(shown), shown))
    return document(element("html", _head(report), body, lang="en"))


def _head(report: Report) -> Element:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{_name(report)}: {report.verdict}"),
        element("style", resources.files(__package__).joinpath(STYLE).read_text(encoding="utf-8")),
    )


def _name(report: Report) -> str:
    return PurePath(report.provenance.bundle).name or report.provenance.bundle


def _header(report: Report) -> Element:
    origin = report.provenance
    gpus = ", ".join(gpu.name for gpu in origin.machine.gpus)
    facts = [
        ("Model", origin.model),
        ("Recipe", origin.recipe),
        ("Ran", ran(origin)),
        ("On", gpus or origin.machine.cpu),
        ("Golden file", PurePath(origin.golden).name if origin.golden else "none"),
        ("Up to level", report.level),
        ("Started", report.created.replace("T", " ")),
        ("Took", quantity(report.seconds, "s")),
    ]
    return element(
        "header",
        element(
            "div",
            element("p", "qie validate", class_="eyebrow"),
            element("h1", _name(report)),
            element(
                "p",
                element("strong", report.verdict.capitalize(), class_=f"verdict {report.verdict}"),
                element("span", _outcome(report)),
                class_="judgement",
            ),
            element("dl", [element("div", element("dt", k), element("dd", v)) for k, v in facts], class_="glance"),
            levels(report),
        ),
        class_=report.verdict,
    )


def _outcome(report: Report) -> str:
    """What the verdict follows from."""
    numbers = counts(report.checks)
    total = f"{numbers['passed']} of {len(report.checks)} checks passed"
    if not numbers["passed"] and not numbers["failed"]:
        return "No check ran."
    parts = [f"{numbers['failed']} failed"] if numbers["failed"] else []
    if numbers["not run"]:
        parts.append(f"{numbers['not run']} did not run" + (", and all are required" if report.required else ""))
    return f"{', '.join([total, *parts])}."


def _contents(sections: list[Element]) -> Element:
    """A link to each section."""
    links = []
    for section in sections:
        heading = section.find("h2")
        assert heading is not None
        links.append(element("a", heading.text, href=f"#{section.attrib['id']}"))
    return element("nav", links, aria_label="Contents")
