"""Read a file into the system's cache while something else is done."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from qie.engines.machine import memory_bytes

__all__ = ["read_ahead"]

PIECE = 1 << 26
"""Bytes that are asked for at a time, so that a process that ends does not wait for a large file."""

SHARE = 0.5
"""A file above this share of the memory that the system can give is not read: it would push itself out again."""


def read_ahead(path: Path) -> threading.Thread | None:
    """Start to read the file ``path``; None where that brings nothing.

    The content is not kept by this process. A file that cannot be read is left to whoever opens it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    available = _available_bytes()
    size = os.fstat(descriptor).st_size
    if not hasattr(os, "posix_fadvise") or available is None or size > SHARE * available:
        os.close(descriptor)
        return None
    thread = threading.Thread(target=_read, args=(descriptor, size), name="qie-read-ahead", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads
        os.close(descriptor)
        return None
    return thread


def _read(descriptor: int, size: int) -> None:
    with suppress(OSError):
        for offset in range(0, size, PIECE):
            os.posix_fadvise(descriptor, offset, PIECE, os.POSIX_FADV_WILLNEED)
    os.close(descriptor)


def _available_bytes() -> int | None:
    """Memory that this process may use without swapping, cached files included (``MemAvailable``, or its limit)."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes())
    return None
