"""What the stages of a build cost: a ``Progress`` that measures from one stage's first report to the next one's."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "Stages"]


@dataclass(kw_only=True, slots=True)
class Cost:
    """What a stage took, over all times that it ran.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of this process and of those that it waited for.
        peak_bytes: resident memory of this process.
        read_bytes, written_bytes: passed to system calls by this process and by those that it waited for.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


class Stages:
    """Costs by the name of the stage, in the order in which they began.

    The kernel's peak of resident memory is reset when a stage begins (``/proc/self/clear_refs``, proc(5)). Where that
    is not allowed, a peak is that of the process so far.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._stage: str | None = None
        self._before = _counters()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress of ``stage``."""
        if stage != self._stage:
            self._change(stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as a stage."""
        self._change(name)
        yield
        self._change(None)

    def end(self) -> None:
        """End the last stage."""
        self._change(None)

    def _change(self, stage: str | None) -> None:
        now = _counters()
        if self._stage is not None:
            cost = self.costs.setdefault(self._stage, Cost())
            cost.seconds += now[0] - self._before[0]
            cost.cpu_seconds += now[1] - self._before[1]
            cost.read_bytes += int(now[2] - self._before[2])
            cost.written_bytes += int(now[3] - self._before[3])
            cost.peak_bytes = max(cost.peak_bytes, _peak_bytes())
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._stage, self._before = stage, now


def _counters() -> tuple[float, float, int, int]:
    """Clock, CPU time, bytes read and bytes written so far."""
    times = os.times()
    io = Path("/proc/self/io").read_text()
    counts = {name: int(value) for name, value in re.findall(r"^(\w+): (\d+)$", io, re.MULTILINE)}
    return time.perf_counter(), sum(times[:4]), counts["rchar"], counts["wchar"]


def _peak_bytes() -> int:
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None
    return int(peak[1]) * 1024
