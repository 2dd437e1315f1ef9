"""Progress bars, tables and numbers for a terminal. Only the cli files use it."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

__all__ = ["Bars", "human_bytes", "human_count", "table"]


class Bars:
    """Progress bars on stderr, one a task, with the time left; silent where stderr is not a terminal.

    Called as ``bars(what, done, total)``.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description:>24}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )

    def __enter__(self) -> "Bars":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows as aligned text, two spaces between columns; the columns in ``right`` are flush right."""
    lines = [list(header), *rows] if header else list(rows)
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for line in lines:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append("  ".join(cells).rstrip())
    if header:
        text.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(text)


def human_bytes(count: int) -> str:
    """A size for people, in units of 1000 bytes: ``4.2 MB``."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def human_count(count: int) -> str:
    """A number of parameters for people: ``13.51 B``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def ago(moment: float) -> str:
    """How long ago a time (seconds since the epoch) was: ``3 hours ago``."""
    seconds = max(0, int(time.time() - moment))
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            number = seconds // size
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"
