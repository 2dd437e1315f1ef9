"""Progress bars, tables and numbers with units for a terminal. Only the cli files print them."""

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import zip_longest
from types import TracebackType
from typing import Any

__all__ = [
    "Bars",
    "ago",
    "human_bytes",
    "human_count",
    "human_memory",
    "human_seconds",
    "printable",
    "say",
    "table",
    "wrap",
]

NARROWEST = 12
"""Characters below which a column is not wrapped."""

LEAST_BYTES = 10**6
"""Units from which on they are bytes: no work has so many steps, images or tensors."""

GAP = 2
"""Spaces between two columns."""


class Bars:
    """Progress bars on stderr, one per task, with the time left; silent where stderr is not a terminal.

    Called as ``bars(what, done, total)``. A million units or more are bytes: their bars show how many a second too.
    """

    def __init__(self, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if enabled and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description:>24}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]:>10}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
                get_time=clock,
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
            self._tasks[what] = self._progress.add_task(what, total=total, rate="")
        number = self._tasks[what]
        self._progress.update(number, completed=done, total=total)
        if total >= LEAST_BYTES:
            task = next(task for task in self._progress.tasks if task.id == number)
            speed = task.finished_speed or task.speed
            self._progress.update(number, rate="" if speed is None else f"{human_bytes(int(speed))}/s")


def say(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Print ``text`` on stdout or stderr; what a file says cannot control the terminal."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # closed by who started this process
        return
    with suppress(OSError) if err else nullcontext():  # a note that nobody can read stops nothing
        print(printable(text), file=stream, end=end, flush=True)


def printable(text: str) -> str:
    """``text`` with escapes in place of what controls a terminal or the direction of text (Unicode TR36, 3.3)."""
    return _CONTROLS.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", text
    )


def table(
    rows: Sequence[Sequence[str]],
    *,
    header: Sequence[str] = (),
    right: Sequence[int] = (),
    notes: Sequence[str | None] = (),
    width: int | None = None,
) -> str:
    """Rows as aligned text, two spaces between columns.

    Where the table is wider than the terminal, the widest columns are wrapped between words, until it fits or nothing
    more can be wrapped.

    Args:
        rows: cells of each row.
        header: names of the columns; none for a table without a header.
        right: columns that are flush right.
        notes: indented text below each row; None for a row without one.
        width: characters; None for the terminal's, or 100 where there is none.
    """
    lines = [list(header), *rows] if header else list(rows)
    if not lines:
        return ""
    widths = _widths(lines, _columns() if width is None else width)
    text = []
    for number, line in enumerate(lines):
        cells = [textwrap.wrap(c, w, **_WRAP) or [""] for c, w in zip(line, widths, strict=True)]
        for pieces in zip_longest(*cells, fillvalue=""):
            padded = [
                p.rjust(w) if i in right else p.ljust(w) for i, (p, w) in enumerate(zip(pieces, widths, strict=True))
            ]
            text.append((" " * GAP).join(padded).rstrip())
        if header and number == 0:
            text.append((" " * GAP).join("-" * w for w in widths))
        row = number - bool(header)
        if 0 <= row < len(notes) and (note := notes[row]) is not None:
            text += [wrap(line, indent=4) for line in note.splitlines()]
    return "\n".join(text)


def wrap(text: str, *, indent: int = 0) -> str:
    """``text`` wrapped between words at the width of the terminal; paths and commands in backticks are not broken."""
    joined = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", _JOINED), text)
    lines = textwrap.wrap(joined, _columns() - indent, **_WRAP)
    return "\n".join(" " * indent + line.replace(_JOINED, " ") for line in lines)


def human_bytes(count: int) -> str:
    """The size of a file or a transfer, in units of 1000 bytes: ``4.2 MB``."""
    return _scaled(count, 1000, ["B", "kB", "MB", "GB", "TB"])


def human_memory(count: float) -> str:
    """An amount of memory, in units of 1024 bytes: ``4.2 GiB``."""
    return _scaled(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def human_count(count: int) -> str:
    """A number of parameters: ``13.51 B``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def human_seconds(seconds: float) -> str:
    """A duration: ``1.6 µs``, ``12 ms``, ``4.5 s``, ``12 min``."""
    if seconds >= 600:
        return f"{seconds / 60:.0f} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} µs"


def ago(moment: float) -> str:
    """How long ago a time (seconds since the epoch) was: ``3 hours ago``."""
    seconds = max(0, int(time.time() - moment))
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            number = seconds // size
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


_CONTROLS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2028\\u2029\\u2066-\\u2069]"
)
"""All controls but tab and line feed, separators of lines, and marks of direction."""

_JOINED = "\N{NO-BREAK SPACE}"
_WRAP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _columns() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _widths(lines: Sequence[Sequence[str]], available: int) -> list[int]:
    """The width of every column: the widest are narrowed as far as their longest words let them."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
    least = [max(longest, min(width, NARROWEST)) for longest, width in zip(least, widths, strict=True)]
    while sum(widths) + GAP * (len(widths) - 1) > available:
        spare = [width if width > smallest else 0 for width, smallest in zip(widths, least, strict=True)]
        if not any(spare):
            break
        widths[spare.index(max(spare))] -= 1
    return widths


def _scaled(count: float, step: int, units: list[str]) -> str:
    size = float(count)
    while size >= 999.5 and len(units) > 1:
        size /= step
        units = units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
