"""What `make test` leaves to ``make test-soak``: most of the tries of an attack, and what compiles for long."""

import os
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["attempts", "spread"]

T = TypeVar("T")


def attempts(usual: int, soak: int) -> int:
    """``usual``, or ``soak`` where QIE_SOAK is set."""
    return soak if os.environ.get("QIE_SOAK") else usual


def spread(cases: Sequence[T], usual: int) -> list[T]:
    """All ``cases`` where QIE_SOAK is set, else ``usual`` of them, evenly spread with the first and the last."""
    count = min(attempts(usual, len(cases)), len(cases))
    if count < 2:
        return list(cases[:count])
    return [cases[round(number * (len(cases) - 1) / (count - 1))] for number in range(count)]
