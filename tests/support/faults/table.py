"""The table of faults in docs/validation.md."""

from tests.support.faults.catalogue import KINDS
from tests.support.faults.expected import EXPECTED

__all__ = ["table"]


def table() -> str:
    """A Markdown table a kind of faults: what is wrong, the checks that fail, what bisecting names."""
    parts = []
    for kind, faults in KINDS.items():
        rows = ["| what is wrong | fails | bisecting names |", "| --- | --- | --- |"]
        for name, fault in faults.items():
            checks, place = EXPECTED[name]
            rows.append(f"| {fault.how} | {checks} | {_code(place)} |".replace("  ", " "))
        parts.append("\n".join([f"### {kind}", "", *rows]))
    return "\n\n".join(parts)


def _code(place: str) -> str:
    return ", ".join(f"`{one}`" for one in place.split(", ")) if place else ""
