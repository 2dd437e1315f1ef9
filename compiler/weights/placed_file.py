"""A file of known size that is written in any order, by a thread of its own, and hashed on the way.

Where pieces come in the order of the file they are hashed as they are. Others are read back once what lies before them
is hashed, which is soon after they were written, from the page cache. The disk is kept busy meanwhile, so that little
is left to wait for at the end.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.errors import BuildError
from qie.engines.files import is_disk_full
from qie.engines.progress import StageProgress, no_progress

__all__ = ["PlacedFile", "disk_error"]

QUEUED_BYTES = 1 << 27
"""Bytes that may wait to be written."""

SYNCED_BYTES = 1 << 27
"""Bytes after which the disk is told to begin."""

_READ_BACK = 1 << 24
_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system says that cannot reserve room for a file."""

Bytes = NDArray[np.uint8]


class PlacedFile:
    """Appears under its name when it is complete; until then it is ``NAME.part``, which ``close`` removes."""

    def __init__(
        self, path: Path, size: int, gaps: Iterable[tuple[int, int]] = (), *, progress: StageProgress = no_progress
    ) -> None:
        """Reserve the room.

        Args:
            path: the file, in an existing folder.
            size: of it, in bytes.
            gaps: beginning and end of what nobody writes, which stays 0.
            progress: called with the bytes done and the bytes in all, by the thread that writes.

        Raises:
            OSError: the disk is full or the file cannot be written.
        """
        self.path, self.size = path, size
        self._temporary = path.with_name(f"{path.name}.part")
        self._progress, self._done = progress, 0
        self._gaps = dict(gaps)
        self._apart: dict[int, tuple[int, Future[None]]] = {}
        self._hashed, self._sha256 = 0, hashlib.sha256()
        self._queue: deque[tuple[int, tuple[Future[None], ...]]] = deque()
        self._queued = self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._temporary.unlink(missing_ok=True)
        if size > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._writing, self._hashing, self._disk = (
            ThreadPoolExecutor(1, thread_name_prefix=f"qie-{what}") for what in ("write", "hash", "sync")
        )
        try:
            _reserve(self._descriptor, size)
            self._hash_on()
            progress(self._done, size)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, content: Bytes) -> None:
        """Write ``content``, which must not change any more, at ``offset``.

        Raises:
            OSError: this or an earlier piece cannot be written.
        """
        written = self._writing.submit(self._write, offset, content)
        works: tuple[Future[None], ...] = (written,)
        if offset == self._hashed:
            works = (written, self._hashing.submit(self._sha256.update, content.data))
            self._hashed += content.size
        else:
            self._apart[offset] = (offset + content.size, written)
        self._hash_on()
        self._queue.append((content.size, works))
        self._queued += content.size
        while self._queue and (self._queued > QUEUED_BYTES or all(work.done() for work in self._queue[0][1])):
            self._wait()

    def publish(self) -> str:
        """Give the complete file its name.

        Returns:
            sha256 of its content, in hex.

        Raises:
            OSError: a piece cannot be written or read back.
        """
        while self._queue:
            self._wait()
        assert self._hashed == self.size, f"{self.path} lacks what begins at {self._hashed}"
        self._hashing.submit(lambda: None).result()
        if self._syncing is not None:  # the kernel tells of an error once
            self._syncing.result()
        os.fsync(self._descriptor)
        self._stop()
        self._temporary.replace(self.path)
        return self._sha256.hexdigest()

    def close(self) -> None:
        """End all work, and remove the file where it was not published."""
        self._stop()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _stop(self) -> None:
        for pool in (self._writing, self._hashing, self._disk):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _wait(self) -> None:
        """Wait for the piece that was queued first."""
        size, works = self._queue.popleft()
        for work in works:
            work.result()
        self._queued -= size
        self._unsynced += size
        if self._unsynced >= SYNCED_BYTES and (self._syncing is None or self._syncing.done()):
            if self._syncing is not None:
                self._syncing.result()
            self._syncing = self._disk.submit(os.fdatasync, self._descriptor)
            self._unsynced = 0
        if size:
            self._done += size
            self._progress(self._done, self.size)

    def _hash_on(self) -> None:
        """Hash what follows what is hashed: gaps, and pieces that were written before."""
        while True:
            if (end := self._gaps.pop(self._hashed, None)) is not None:
                self._hashing.submit(self._sha256.update, bytes(end - self._hashed))
                self._done += end - self._hashed
            elif self._hashed in self._apart:
                end, written = self._apart.pop(self._hashed)
                work = self._hashing.submit(self._hash_back, self._hashed, end, written)
                self._queue.append((0, (work,)))
            else:
                return
            self._hashed = end

    def _write(self, offset: int, content: Bytes) -> None:
        buffer = content.data
        while buffer:
            count = os.pwrite(self._descriptor, buffer, offset)
            buffer, offset = buffer[count:], offset + count

    def _hash_back(self, start: int, stop: int, written: "Future[Any]") -> None:
        written.result()
        buffer = memoryview(bytearray(min(_READ_BACK, stop - start)))
        while start < stop:
            count = os.preadv(self._descriptor, [buffer[: stop - start]], start)
            if not count:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._sha256.update(buffer[:count])
            start += count


def disk_error(error: OSError, path: Path, total: int) -> BuildError:
    """What to raise where ``error`` stopped the writing of ``path``, which needs ``total`` bytes."""
    if is_disk_full(error):
        free = shutil.disk_usage(path.parent).free
        return BuildError(
            f"{path} needs {total:,} bytes, and {free:,} are free ({error.strerror}); make room, or build elsewhere"
        )
    return BuildError(f"{path} cannot be written ({error}); check the folder and its permissions")


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and the room for it where the file system can."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_ALLOCATION:
            raise
        os.ftruncate(descriptor, size)
