"""Folders that are whole or absent while others read, replace and delete them.

Whoever writes a folder, and whoever reads one, holds a lock on a file inside it (``try_lock``): for a bundle its
manifest. The lock tells across threads, processes, containers and hosts what is in use; what nobody holds is deleted by
the next build of the same name, by ``qie rm`` and by ``qie clean``.
"""

import ctypes
import errno
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from qie.engines.files import is_leftover, leftovers_of, size_of, sync, temporary_name, try_lock

__all__ = [
    "WORK_LOCK",
    "HeldFolder",
    "clear_leftovers",
    "is_held",
    "leftovers",
    "remove_folder",
    "remove_leftover",
    "replacing_folder",
    "restore_moved",
    "resumed_bytes",
    "resumed_folder",
]

T = TypeVar("T")

WORK_LOCK = ".lock"
"""Lock of a folder that has no file of its own for it; deleted when the folder is complete."""

_LOCKS = ("manifest.json", WORK_LOCK)
"""The first of these that a folder has is its lock."""

_ATTEMPTS = 500
_PAUSE = 0.01
"""Seconds between two attempts to hold a folder that is being replaced."""

_RENAME_EXCHANGE = 2
"""Flag of renameat2 (linux/fs.h): the two names swap what they name."""


class HeldFolder:
    """A folder that a reader has open.

    Nobody deletes it meanwhile, and what it holds stays the same when another folder takes its name.

    Attributes:
        path: where it was opened.
        lock: content of its lock file.
        verified: names of files whose content was compared with their digests, for the caller to keep.
    """

    def __init__(self, path: Path, lock: str) -> None:
        """Open the folder ``path`` and lock its file ``lock``.

        Raises:
            OSError: the folder or the file is missing or cannot be read, or it is being deleted.
        """
        self.path = path.absolute()
        self.verified: set[str] = set()
        self._directory, descriptor = _hold(self.path, lock)
        weakref.finalize(self, _release, self.path, self._directory, descriptor)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            self.lock = file.read()

    @property
    def replaced(self) -> bool:
        """Whether its name is another folder's now, or nobody's."""
        return not _is_at(self.path, self._directory)

    def read(self, action: Callable[[Path], T], *, discard: Callable[[T], object] | None = None) -> T:
        """The result of ``action`` with the path at which the folder is, again where that changed meanwhile.

        Args:
            action: opens what it needs by the path.
            discard: releases a result of a path that is another folder's now.

        Raises:
            FileNotFoundError: the folder was deleted.
        """
        while True:
            path = _place(self.path, self._directory)
            try:
                result = action(path)
            except Exception:
                if _is_at(path, self._directory):
                    raise
                continue
            if _is_at(path, self._directory):
                return result
            if discard is not None:
                discard(result)


@contextmanager
def replacing_folder(path: Path, *, lock: str = WORK_LOCK) -> Iterator[Path]:
    """A temporary folder beside ``path``; it replaces ``path`` when the block succeeds, otherwise it is removed.

    It is flushed to the disk, then the two change places at once, so that there is always one of them. Leftovers of
    killed processes are removed first. A link is followed.

    Args:
        path: the folder to write.
        lock: name of a file of the complete folder that exists from the start, is written in place and tells that
            somebody writes it; by default a file that is deleted in the end.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    folder, descriptor = _create(path, lock)
    try:
        yield folder
        _flush(folder)
        _publish(folder, path)
        if lock == WORK_LOCK:
            _unlink_own(path / lock, descriptor)
    finally:
        os.close(descriptor)
        remove_leftover(folder)


@contextmanager
def resumed_folder(path: Path, *, worth: int) -> Iterator[Path]:
    """A folder beside ``path`` for pieces of it, which an attempt that failed leaves to the next one.

    It is the folder that an earlier attempt left, or a new one where there is none or another process has it. When the
    block succeeds it is removed, otherwise it stays if keeping it is worth its place.

    Args:
        path: what is made of the pieces. A link is followed.
        worth: bytes from which the pieces of a failed attempt are kept; those of a killed one stay in any case.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, descriptor = _adopt(path) or _create(path, WORK_LOCK, "pieces")
    try:
        yield folder
    except BaseException:
        os.close(descriptor)
        if size_of(folder) < worth:
            remove_leftover(folder)
        raise
    os.close(descriptor)
    remove_leftover(folder)


def resumed_bytes(path: Path) -> int:
    """Bytes that ``resumed_folder`` would take up or free for ``path``."""
    path = path.resolve()
    found = [folder for folder, _, kind in leftovers_of(path.parent, path.name) if kind == "pieces"]
    return sum(size_of(folder, alone=True) for folder in found if not is_held(folder))


def clear_leftovers(path: Path) -> None:
    """Put ``path`` back where a killed process had moved it aside, and remove what nobody uses of its leftovers.

    Pieces stay (``resumed_folder``).
    """
    restore_moved(path.parent, path.name)
    for leftover, _, kind in leftovers_of(path.parent, path.name):
        if kind != "pieces":
            remove_leftover(leftover)


def restore_moved(parent: Path, name: str | None = None) -> None:
    """Put back the folders in ``parent``, of one name or of any, that killed processes had moved aside."""
    for leftover, moved, kind in leftovers_of(parent, name):
        target = parent / (moved if name is None else name)
        if kind == "old" and not target.exists():
            with suppress(OSError):
                leftover.rename(target)


def leftovers(parent: Path) -> tuple[Path, ...]:
    """The leftover folders in ``parent``, of any name, that nobody uses."""
    return tuple(path for path, _, _ in leftovers_of(parent) if path.is_dir() and not is_held(path))


def remove_folder(path: Path) -> bool:
    """Delete the folder ``path``: its name is free at once, its content when the last reader has closed it.

    Returns:
        Whether the content is deleted already.
    """
    clear_leftovers(path)
    aside = temporary_name(path, "removed")
    path.rename(aside)
    sync(path.parent)
    for leftover, _, _ in leftovers_of(path.parent, path.name):
        remove_leftover(leftover)
    return not aside.exists()


def remove_leftover(folder: Path) -> bool:
    """Delete a folder that nobody holds, its lock last; whether it is gone."""
    try:
        lock, descriptor = _open_lock(folder)
        if descriptor is None:
            with suppress(OSError):
                folder.rmdir()  # empty: whoever has just made it makes another
                return True
            lock, descriptor = _open_lock(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if descriptor is None:
        shutil.rmtree(folder, ignore_errors=True)  # nobody writes into a folder without a lock
        return not folder.exists()
    try:
        if try_lock(descriptor, exclusive=True):
            for entry in folder.iterdir():
                if entry.name != lock:
                    _remove(entry)
            _remove(folder / lock)
            folder.rmdir()
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return not folder.exists()


def _unlink_own(path: Path, descriptor: int) -> None:
    """Unlink the open file, unless another folder has taken its place meanwhile."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            path.unlink()


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _adopt(path: Path) -> tuple[Path, int] | None:
    """The folder of pieces that an earlier attempt at ``path`` left, and the descriptor of its lock; None without one.

    Where several were left, the others are removed.
    """
    found: tuple[Path, int] | None = None
    for folder, _, kind in leftovers_of(path.parent, path.name):
        if kind != "pieces":
            continue
        if found is not None:
            remove_leftover(folder)
            continue
        try:
            descriptor = os.open(folder / WORK_LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            remove_leftover(folder)
            continue
        if try_lock(descriptor, exclusive=True) is True and os.fstat(descriptor).st_nlink:
            found = folder, descriptor
        else:
            os.close(descriptor)
    return found


def _create(path: Path, lock: str, kind: str = "tmp") -> tuple[Path, int]:
    """A new folder beside ``path`` with a locked file in it, and the file's descriptor."""
    while True:
        folder = temporary_name(path, kind)
        folder.mkdir()
        try:
            descriptor = os.open(folder / lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another process took the empty folder for a leftover
        if try_lock(descriptor, exclusive=True) is not False and os.fstat(descriptor).st_nlink:
            return folder, descriptor
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """Force everything in ``folder`` onto the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def _publish(folder: Path, path: Path) -> None:
    """Let ``folder`` and ``path`` change places; where the file system cannot, move ``path`` aside first."""
    while not _exchange(folder, path):
        aside = None
        if path.exists() and any(path.iterdir()):
            aside = temporary_name(path, "old")
            path.rename(aside)
        try:
            folder.rename(path)
        except OSError as problem:
            if aside is not None and not path.exists():
                aside.rename(path)
            if problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another process was faster
            raise
        if aside is not None:
            done_with = temporary_name(path, "removed")  # what is half-deleted must not be put back
            aside.rename(done_with)
            remove_leftover(done_with)
        break
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system cannot, or ``other`` does not exist."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd = -100  # both paths are absolute
    code: int = renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), _RENAME_EXCHANGE)
    return code == 0


def _open_lock(folder: Path) -> tuple[str, int | None]:
    """The lock file of ``folder`` and its descriptor; None where the folder has none."""
    for name in _LOCKS:
        with suppress(FileNotFoundError):
            return name, os.open(folder / name, os.O_RDWR | os.O_CLOEXEC)
    if not folder.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    return "", None


def is_held(folder: Path) -> bool:
    """Whether somebody uses ``folder``, or that cannot be told."""
    try:
        _, descriptor = _open_lock(folder)
    except OSError:
        return True
    if descriptor is None:
        return False
    try:
        return try_lock(descriptor, exclusive=True) is not True
    finally:
        os.close(descriptor)


def _hold(path: Path, lock: str) -> tuple[int, int]:
    """Descriptors of the folder ``path`` and of its locked file ``lock``."""
    for _ in range(_ATTEMPTS):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        except OSError:
            stays = _is_at(path, directory)
            os.close(directory)
            if stays:
                raise
            continue
        if try_lock(descriptor, exclusive=False) is not False and os.fstat(descriptor).st_nlink:
            return directory, descriptor
        os.close(descriptor)
        os.close(directory)
        time.sleep(_PAUSE)  # the folder is being replaced or deleted
    raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing or deleting it", str(path))


def _release(path: Path, directory: int, descriptor: int) -> None:
    """Let go of a folder; the last reader of one that was replaced or removed deletes it."""
    place = None
    with suppress(OSError):
        place = _place(path, directory)
    os.close(descriptor)
    os.close(directory)
    if place is not None and place != path and is_leftover(place):
        remove_leftover(place)


def _place(path: Path, directory: int) -> Path:
    """Where the open folder is now: ``path``, or the name to which it was moved."""
    if _is_at(path, directory):
        return path
    moved = Path(f"/proc/self/fd/{directory}").readlink()
    if not _is_at(moved, directory):
        raise FileNotFoundError(errno.ENOENT, "it was deleted", str(path))
    return moved


def _is_at(path: Path, directory: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(directory))
    except OSError:
        return False
