"""What the stages of a build cost: a ``Progress`` that measures from one stage's first report to the next one's."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "Stages", "forget", "peak_bytes", "plain_read", "plain_write"]

BLOCK = 1 << 24
"""Bytes of one plain read or write."""

FETCH = "fetch"
"""What is reported from another thread while a stage runs."""


@dataclass(kw_only=True, slots=True)
class Cost:
    """What a stage took, over all times that it ran.

    Attributes:
        seconds: on the clock.
        cpu_seconds: of this process and of those that it waited for.
        peak_bytes: resident memory of this process.
        read_bytes, written_bytes: passed to system calls by this process and by those that it waited for.
        total: what the stage's reports count to.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    total: int = 0


class Stages:
    """Costs by the name of the stage, in the order in which they began.

    The kernel's peak of resident memory is reset when a stage begins (``/proc/self/clear_refs``, proc(5)). Where that
    is not allowed, a peak is that of the process so far. Reports of fetched shards begin no stage: they come from
    another thread, while the stage that reads them runs.

    Attributes:
        costs: of the stages.
        fetched_bytes, fetch_seconds: of ``fetching``.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self.fetched_bytes, self.fetch_seconds = 0, 0.0
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._before = _counters()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress of ``stage``."""
        if stage == FETCH:
            return
        with self._lock:
            if stage != self._stage:
                self._change(stage)
            self.costs.setdefault(stage, Cost()).total = total

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as a stage."""
        with self._lock:
            self._change(name)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def fetching(self, count: int) -> Iterator[None]:
        """Count the block, in any thread, as a fetch of ``count`` bytes; it belongs to the stages' time too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.fetched_bytes += count
                self.fetch_seconds += time.perf_counter() - start

    def end(self) -> None:
        """End the last stage."""
        with self._lock:
            self._change(None)

    def _change(self, stage: str | None) -> None:
        now = _counters()
        if self._stage is not None:
            cost = self.costs.setdefault(self._stage, Cost())
            cost.seconds += now[0] - self._before[0]
            cost.cpu_seconds += now[1] - self._before[1]
            cost.read_bytes += int(now[2] - self._before[2])
            cost.written_bytes += int(now[3] - self._before[3])
            cost.peak_bytes = max(cost.peak_bytes, peak_bytes())
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._stage, self._before = stage, now


def _counters() -> tuple[float, float, int, int]:
    """Clock, CPU time, bytes read and bytes written so far."""
    times = os.times()
    io = Path("/proc/self/io").read_text()
    counts = {name: int(value) for name, value in re.findall(r"^(\w+): (\d+)$", io, re.MULTILINE)}
    return time.perf_counter(), sum(times[:4]), counts["rchar"], counts["wchar"]


def peak_bytes() -> int:
    """Peak resident memory of this process, from the kernel."""
    peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert peak is not None
    return int(peak[1]) * 1024


def plain_read(file: Path) -> float:
    """Seconds that a plain read of ``file`` takes, from the disk and not from what the kernel has cached of it."""
    forget(file)
    buffer = bytearray(BLOCK)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - start


def plain_write(file: Path, count: int) -> float:
    """Seconds that a plain write of ``count`` bytes to ``file`` takes, until they are on the disk."""
    block = memoryview(os.urandom(BLOCK))
    start = time.perf_counter()
    with file.open("wb", buffering=0) as stream:
        for offset in range(0, count, BLOCK):
            stream.write(block[: count - offset])
        os.fsync(stream.fileno())
    return time.perf_counter() - start


def forget(file: Path) -> None:
    """Let the kernel forget what it has cached of ``file``."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
