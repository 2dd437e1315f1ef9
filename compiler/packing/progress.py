"""Progress of a build."""

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (kind of work, bytes or units done, bytes or units in all)."""
