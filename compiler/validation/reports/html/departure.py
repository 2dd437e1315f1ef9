"""Where a component leaves the reference: the first block and operation, what it reads, and the lines that write it."""

from xml.etree.ElementTree import Element

from qie.compiler.validation.report import Bisection, Operation
from qie.compiler.validation.reports.html.markup import Child, breakable, element
from qie.compiler.validation.reports.words import cosine_words, first_operation, number

__all__ = ["cause", "departure", "source"]

PREFIX = "compiler/graphs/"
"""Folder of nearly all lines that write an operation."""


def cause(bisection: Bisection) -> Element:
    """The item of a list that says where to look first."""
    title = element(
        "p",
        element("span", "look here first", class_="pill failed"),
        " ",
        element("strong", bisection.component),
        " ",
        element("a", "all its operations", href="#bisection"),
    )
    return element("li", title, departure(bisection), class_="cause")


def departure(bisection: Bisection) -> Element:
    """What is known of the first block and operation outside their tolerance."""
    first = first_operation(bisection)
    facts: list[tuple[str, Child]] = [
        ("First operation outside its tolerance", breakable(bisection.first_operation or "none")),
        ("First block outside its tolerance", breakable(bisection.first_block or "none")),
    ]
    if first is not None:
        distance = f"relative L2 {number(first.relative_l2)}, tolerance {number(first.tolerance)}, "
        facts += [
            ("Found", f"{distance}similarity {cosine_words(first.similarity)}"),
            ("Reads", breakable(", ".join(first.tensors) or "no tensor of the checkpoint")),
            ("Written by", breakable(first.source)),
        ]
    rows = [element("div", element("dt", name), element("dd", fact)) for name, fact in facts]
    return element("dl", rows, class_="first")


def source(operation: Operation) -> Element:
    """The lines that write an operation, without their folder, which is told on hovering."""
    lines = [line.removeprefix(PREFIX) for line in operation.source.split(", ")]
    shown = [[breakable(line), ", " if place < len(lines) else None] for place, line in enumerate(lines, start=1)]
    return element("code", shown, title=operation.source)
