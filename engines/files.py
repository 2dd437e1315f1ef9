"""Files that are whole or absent: everything is written under a temporary name and renamed when complete."""

import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["existing", "is_disk_full", "qie_home", "replacing", "replacing_folder", "sha256_of"]


def qie_home() -> Path:
    """Where bundles and caches live: ``$QIE_HOME``, else ``qie`` in the user's cache folder."""
    if home := os.environ.get("QIE_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qie"


def existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists: the file system that holds what is written to ``path``."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def is_disk_full(error: OSError) -> bool:
    """Whether ``error`` says that a disk, a quota or the size of a file is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; it becomes ``path`` when the block succeeds, otherwise it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; it replaces ``path`` when the block succeeds, otherwise it is removed.

    Leftovers of killed processes are removed first. A link is followed.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(path: Path) -> None:
    """Restore or remove what killed processes left beside ``path``."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        pid, _, kind = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("tmp", "old") or not pid.isdigit() or _runs(int(pid)):
            continue
        if kind == "old" and not path.exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
