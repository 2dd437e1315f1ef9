"""Read files into the system's cache while something else is done."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from qie.engines.machine import memory_bytes

__all__ = ["read_ahead"]

PIECE = 1 << 26
"""Bytes that are asked for at a time, so that a process that ends does not wait for a large file."""

SHARE = 0.5
"""Files above this share of the memory that the system can give are not read: they would push themselves out again."""


def read_ahead(*paths: Path) -> threading.Thread | None:
    """Start to read the files ``paths``, one after the other; None where that brings nothing.

    The first files are read that fit into memory together. The content is not kept by this process. A file that cannot
    be read is left to whoever opens it.
    """
    available = _available_bytes()
    if not hasattr(os, "posix_fadvise") or available is None:
        return None
    with ExitStack() as stack:
        files: list[tuple[int, int]] = []
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                break
            stack.callback(os.close, descriptor)
            files.append((descriptor, os.fstat(descriptor).st_size))
            if sum(size for _, size in files) > SHARE * available:
                files.pop()
                break
        if not files:
            return None
        thread = threading.Thread(
            target=_read, args=(files, closing := stack.pop_all()), name="qie-read-ahead", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            closing.close()
            return None
    return thread


def _read(files: Sequence[tuple[int, int]], closing: ExitStack) -> None:
    with closing, suppress(OSError):
        for descriptor, size in files:
            for offset in range(0, size, PIECE):
                os.posix_fadvise(descriptor, offset, PIECE, os.POSIX_FADV_WILLNEED)


def _available_bytes() -> int | None:
    """Memory that this process may use without swapping, cached files included (``MemAvailable``, or its limit)."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes())
    return None
