"""Folders that others read, replace and delete at the same time.

Whoever writes a folder, and whoever reads one, holds a lock on a file inside it (``try_lock``): for a bundle its
manifest. The lock tells across threads, processes, containers and hosts what is in use; what nobody holds is deleted by
the next build of the same name, by ``qie rm`` and by ``qie clean``.
"""

import errno
import os
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from qie.engines.files import is_leftover, leftovers_of, sync, temporary_name, try_lock

__all__ = [
    "WORK_LOCK",
    "HeldFolder",
    "clear_leftovers",
    "is_held",
    "leftovers",
    "remove_entry",
    "remove_folder",
    "remove_held",
    "remove_leftover",
    "restore_moved",
]

T = TypeVar("T")

WORK_LOCK = ".lock"
"""Lock of a folder that has no file of its own for it; deleted when the folder is complete."""

_LOCKS = ("manifest.json", WORK_LOCK)
"""The first of these that a folder has is its lock."""

_ATTEMPTS = 500
_PAUSE = 0.01
"""Seconds between two attempts to hold a folder that is being replaced."""


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
        return not self.is_at(self.path)

    def is_at(self, path: Path) -> bool:
        """Whether it is the folder ``path``."""
        return _is_at(path, self._directory)

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
            remove_held(folder, lock)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return not folder.exists()


def remove_held(folder: Path, lock: str) -> None:
    """Delete a folder whose file ``lock`` this process holds, as far as the system lets it; that file comes last."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != lock:
                with suppress(OSError):
                    remove_entry(entry)
        if all(entry.name == lock for entry in folder.iterdir()):
            remove_entry(folder / lock)
            folder.rmdir()


def remove_entry(entry: Path) -> None:
    """Delete a file, a link or a folder."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


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
    os.close(descriptor)  # first: whoever moves the folder after the look below finds it free
    place = None
    with suppress(OSError):
        place = _place(path, directory)
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
