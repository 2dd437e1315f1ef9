"""Elements of HTML and SVG from trusted names and untrusted text: whatever is text is escaped when it is written."""

import re
from collections.abc import Iterable, Iterator
from xml.etree.ElementTree import Element, tostring

from qie.compiler.validation.reports.words import clean

__all__ = ["Child", "breakable", "document", "element", "prose"]

Child = Element | str | None | Iterable["Child"]
"""What an element holds: elements, text, nothing, or several of these."""


def element(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """An element.

    Args:
        tag: its name.
        children: what it holds, in order.
        attributes: an underscore in a name stands for a hyphen, and one at its end for nothing; None for no attribute.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(
                name.rstrip("_").replace("_", "-"), clean(f"{value:g}" if isinstance(value, float) else str(value))
            )
    _fill(made, children)
    return made


def breakable(name: str) -> Iterator[Child]:
    """A dotted name or a path, which a narrow column may break behind its dots and slashes."""
    for piece in re.findall(r"[^./]*[./]?", name):
        yield piece
        yield Element("wbr")


def prose(text: str) -> Iterator[Child]:
    """A sentence with its commands, which are in backticks, as code."""
    for place, piece in enumerate(re.split(r"`([^`]*)`", text)):
        yield element("code", piece) if place % 2 else piece


def document(root: Element) -> str:
    """A page with ``root`` as its only element."""
    return f"<!doctype html>\n{tostring(root, encoding='unicode', method='html')}\n"


def _fill(parent: Element, child: Child) -> None:
    match child:
        case None:
            return
        case Element():
            parent.append(child)
        case str():
            if len(parent):
                parent[-1].tail = (parent[-1].tail or "") + clean(child)
            else:
                parent.text = (parent.text or "") + clean(child)
        case _:
            for item in child:
                _fill(parent, item)
