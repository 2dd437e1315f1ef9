"""Folders that are whole or absent: written beside their place, and put there at once.

An attempt that fails leaves nothing, or the pieces that the next one goes on with.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qie.engines.files import is_link_loop, leftovers_of, size_of, sync, temporary_name, try_lock
from qie.engines.folders import (
    WORK_LOCK,
    HeldFolder,
    clear_leftovers,
    is_held,
    remove_held,
    remove_leftover,
)

__all__ = ["ReplacedError", "replacing_folder", "resumed_bytes", "resumed_folder"]

_RENAME_EXCHANGE = 2
"""Flag of renameat2 (linux/fs.h): the two names swap what they name."""


class ReplacedError(OSError):
    """The folder to replace is another one than was opened, or is gone."""


@contextmanager
def replacing_folder(path: Path, *, lock: str = WORK_LOCK, replaces: HeldFolder | None = None) -> Iterator[Path]:
    """A temporary folder beside ``path``; it replaces ``path`` when the block succeeds, otherwise it is removed.

    It is flushed to the disk, then the two change places at once, so that there is always one of them. Leftovers of
    killed processes are removed first. A link is followed.

    Args:
        path: the folder to write.
        lock: name of a file of the complete folder that exists from the start, is written in place and tells that
            somebody writes it; by default a file that is deleted in the end.
        replaces: the folder that is replaced; None for whatever is there.

    Raises:
        ReplacedError: another folder, or none, is there in place of ``replaces``; it stays.
        OSError: the links at ``path`` lead back to themselves, or the folder cannot be written.
    """
    path = _resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    folder, descriptor = _create(path, lock)
    try:
        try:
            yield folder
        except BaseException:
            remove_held(folder, lock)
            raise
        _flush(folder)
        _publish(folder, path, replaces)
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

    Raises:
        OSError: the links at ``path`` lead back to themselves, or the folder cannot be written.
    """
    path = _resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, descriptor = _adopt(path) or _create(path, WORK_LOCK, "pieces")
    stays = True
    try:
        yield folder
        stays = False
    except BaseException:
        stays = size_of(folder) >= worth
        raise
    finally:
        if not stays:
            remove_held(folder, WORK_LOCK)
        os.close(descriptor)


def resumed_bytes(path: Path) -> int:
    """Bytes that ``resumed_folder`` would take up or free for ``path``.

    Raises:
        OSError: the links at ``path`` lead back to themselves.
    """
    path = _resolved(path)
    found = [folder for folder, _, kind in leftovers_of(path.parent, path.name) if kind == "pieces"]
    return sum(size_of(folder, alone=True) for folder in found if not is_held(folder))


def _unlink_own(path: Path, descriptor: int) -> None:
    """Unlink the open file, unless another folder has taken its place meanwhile."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            path.unlink()


def _resolved(path: Path) -> Path:
    """``path`` with its links followed.

    Raises:
        OSError: they lead back to themselves.
    """
    if is_link_loop(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path.resolve()


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


def _publish(folder: Path, path: Path, replaces: HeldFolder | None) -> None:
    """Let ``folder`` and ``path`` change places; where the file system cannot, move ``path`` aside first.

    Raises:
        ReplacedError: ``path`` is not ``replaces``.
    """
    own = folder.stat()
    while True:
        if replaces is not None and replaces.replaced:
            raise ReplacedError(f"{path} is another folder")
        if _exchange(folder, path):
            if replaces is None or replaces.is_at(folder):
                break
            with suppress(FileNotFoundError):  # somebody was faster than the look, and another may have been since
                if os.path.samestat(path.stat(), own):
                    _exchange(folder, path)
            raise ReplacedError(f"{path} is another folder")
        aside = None
        if path.exists() and any(path.iterdir()):
            aside = temporary_name(path, "old")
            path.rename(aside)
        if replaces is not None and (aside is None or not replaces.is_at(aside)):
            if aside is not None:
                aside.rename(path)
            raise ReplacedError(f"{path} is another folder")
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
