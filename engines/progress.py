"""Progress of long work, such as a build or an edit, as functions that are called with it."""

from collections.abc import Callable

__all__ = ["Progress", "StageProgress", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, units done, units in all)."""

StageProgress = Callable[[int, int], None]
"""Called with (units done, units in all) of one stage."""


def no_progress(*report: str | int) -> None:
    """Ignore a report: the ``Progress`` and ``StageProgress`` of work that nobody watches."""
