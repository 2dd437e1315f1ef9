"""Files that are whole or absent: everything is written under a temporary name and published when complete."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qie.engines.errors import BundleError

__all__ = [
    "existing",
    "is_disk_full",
    "is_leftover",
    "is_link_loop",
    "is_writable",
    "leftovers_of",
    "qie_home",
    "read_regular",
    "replacing",
    "sha256_of",
    "size_of",
    "sync",
    "temporary_name",
    "try_lock",
]

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16}|\d+)\.(?P<kind>tmp|old|removed|pieces)", re.DOTALL)
"""What a process that was killed leaves: half-written (tmp), moved aside (old), half-deleted (removed), or complete
pieces of an unfinished whole (pieces).

The token is random; the first versions of qie took the number of the process."""

_OURS = re.compile(r"manifest\.json|tokenizer\.json|calibration\.npz|schedules|.+\.(onnx|weights|part|engine|json)")
"""Names in a folder of those first versions."""

_LONGEST_NAME = 200
"""Bytes of a name that a temporary name contains whole: file systems allow 255."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock says on a file system that has no locks."""


def qie_home() -> Path:
    """Where bundles and caches live: ``$QIE_HOME``, else ``qie`` in the user's cache folder.

    Raises:
        BundleError: neither is known.
    """
    if home := os.environ.get("QIE_HOME"):
        return Path(home)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "qie"
    try:
        return Path.home() / ".cache" / "qie"
    except RuntimeError:
        raise BundleError(
            "this user has no home folder for bundles and caches; set QIE_HOME to a folder that may be written"
        ) from None


def existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists: the file system that holds what is written to ``path``."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def is_link_loop(path: Path) -> bool:
    """Whether the links at ``path`` lead back to themselves, so that no file can be there."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def is_writable(path: Path) -> bool:
    """Whether ``replacing`` can write the file ``path``: in an existing folder, and over nothing but a file."""
    try:
        if is_link_loop(path) or (path.exists() and not (path.is_file() and os.access(path, os.W_OK))):
            return False
        folder = path.resolve().parent
        return folder.is_dir() and os.access(folder, os.W_OK)
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_regular(path: Path, *, most: int) -> bytes:
    """The content of a file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a folder, a pipe or a device, or larger.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder, a pipe or a device")
    if path.stat().st_size > most:
        raise ValueError(f"it has {path.stat().st_size:,} bytes")
    return path.read_bytes()


def is_disk_full(error: OSError) -> bool:
    """Whether ``error`` says that a disk, a quota or the size of a file is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path, *, alone: bool = False) -> int:
    """Bytes of a file, or of all files in a folder; ``alone`` leaves out files that have other names."""
    files = [path] if path.is_file() else path.rglob("*")
    total = 0
    for file in files:
        with suppress(OSError):  # deleted meanwhile
            stat = file.lstat()
            total += 0 if file.is_dir() or (alone and stat.st_nlink > 1) else stat.st_size
    return total


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside ``path`` that nobody else uses or can guess."""
    return path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(8)}.{kind}")


def leftovers_of(parent: Path, name: str | None = None) -> list[tuple[Path, str, str]]:
    """What ``temporary_name`` named in the folder ``parent``, for ``name`` or for any: path, name and kind of each.

    Whether somebody still writes one is not examined.
    """
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return []
    named = [(entry, match) for entry in entries if (match := _LEFTOVER.fullmatch(entry.name))]
    matches = [(entry, match) for entry, match in named if not entry.is_symlink()]  # qie makes no links
    found = [(entry, match) for entry, match in matches if _is_ours(entry, match)]
    wanted = None if name is None else _shortened(name)
    return [(entry, match["name"], match["kind"]) for entry, match in found if wanted in (None, match["name"])]


def _is_ours(entry: Path, match: re.Match[str]) -> bool:
    """Whether qie made ``entry``: a token of 16 digits is its own, a shorter one may be anybody's."""
    if len(match["token"]) == 16:
        return True
    try:
        return entry.is_dir() and all(_OURS.fullmatch(file.name) for file in entry.iterdir())
    except OSError:
        return False


def _shortened(name: str) -> str:
    """``name``, or where it is so long that nothing can be added to it, its beginning and its digest."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    return f"{name[:40]}~{hashlib.sha256(encoded).hexdigest()[:16]}"


def is_leftover(path: Path) -> bool:
    """Whether ``path`` has a name of ``temporary_name``."""
    return _LEFTOVER.fullmatch(path.name) is not None


def try_lock(descriptor: int, *, exclusive: bool) -> bool | None:
    """Lock an open file for as long as it is open (flock): across threads, processes, containers and hosts.

    Returns:
        Whether the lock was granted; None where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            return None
        if problem.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path``; it becomes ``path`` when the block succeeds, otherwise it is removed.

    The file is empty and exists already; it has to be written in place. What killed processes left of ``path`` is
    removed first. A link at ``path`` is followed.

    Args:
        path: the file to write.
        overwrite: replace an existing file; otherwise only one of several writers wins.

    Raises:
        FileExistsError: ``path`` exists when the block is done, and ``overwrite`` is false.
    """
    if overwrite and path.is_symlink():
        if is_link_loop(path):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        path = path.resolve()
    for leftover, _, _ in leftovers_of(path.parent, path.name):
        _remove_unlocked(leftover)
    temporary, descriptor = _create(path)
    try:
        yield temporary
        os.fsync(descriptor)
        if overwrite:
            temporary.replace(path)
        else:
            _publish_new(temporary, path)
        with suppress(OSError):  # a folder that may be written and not read cannot be opened
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def _create(path: Path) -> tuple[Path, int]:
    """A new locked file beside ``path``, and its descriptor."""
    while True:
        temporary = temporary_name(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if try_lock(descriptor, exclusive=True) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover


def _publish_new(temporary: Path, path: Path) -> None:
    """Give the file the name ``path``, which must not exist."""
    try:
        os.link(temporary, path)
    except OSError as problem:
        if problem.errno == errno.EEXIST:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # a file system without hard links
        temporary.replace(path)


def _remove_unlocked(leftover: Path) -> None:
    """Remove a temporary file that nobody writes."""
    with suppress(OSError):
        descriptor = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_lock(descriptor, exclusive=True):
                leftover.unlink()
        finally:
            os.close(descriptor)
