"""A cache that proves what it holds: each entry is stored with a digest of what it was made from and of its content."""

import errno
import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from qie.engines.errors import BundleError
from qie.engines.files import qie_home, replacing

__all__ = ["Cache", "encoder_cache_on_disk", "tables_cache"]

_TABLES_BYTES = 8 << 30
"""Most that the cache of modulation tables holds: thirty schedules of 40 steps of the published model."""

_ENCODER_BYTES = 2 << 30
"""Most that the cache of embeddings holds: those of 300 edits of the published model, each of another image (an image
alone has 2.8 MB, 196 tokens of 3584 float32 values, and an instruction about it 3.7 MB), and of 50 of its first
generation (19.6 MB and 20.5 MB)."""

_DIGEST_BYTES = 32

_LARGEST = 1 << 30
"""Bytes that an entry may have in a cache that holds less: it is kept alone."""

_PRIVATE = 0o700


class Cache:
    """Entries in the folder ``root``, in groups; the least recently used are deleted beyond ``bytes_max``.

    A cache costs time where it fails, and nothing else: an entry that is absent, damaged, or of something else is
    None, and one that cannot be written is not kept.
    """

    def __init__(self, root: Path, *, bytes_max: int, private: bool = False) -> None:
        """A cache of at most ``bytes_max`` in ``root``, which only its owner can open where it is ``private``."""
        self._root, self._bytes_max, self._mode = root, bytes_max, _PRIVATE if private else 0o777

    def load(self, group: str, made_from: str) -> memoryview | None:
        """The content of the entry that was made from ``made_from``, a text that decides it completely."""
        path = self._path(group, made_from)
        try:
            stored = memoryview(self._read(path))
        except (OSError, MemoryError):
            return None
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if bytes(digest) != _digest(made_from, content):
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return content

    def store(self, group: str, made_from: str, content: memoryview) -> None:
        """Keep ``content`` under what it was made from."""
        path = self._path(group, made_from)
        with suppress(OSError):
            self._root.mkdir(mode=self._mode, parents=True, exist_ok=True)
            if self._mode == _PRIVATE:
                self._root.chmod(_PRIVATE)
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary, temporary.open("wb") as file:
                file.write(_digest(made_from, content))
                file.write(content)
            self._trim(path)

    def drop(self, group: str) -> None:
        """Delete all entries of ``group``."""
        shutil.rmtree(self._root / _name(group), ignore_errors=True)

    def _read(self, path: Path) -> bytes:
        """The content of a file that may be an entry, which is no pipe or device and not larger than all entries."""
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_size > max(self._bytes_max, _LARGEST):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return file.read()

    def _path(self, group: str, made_from: str) -> Path:
        return self._root / _name(group) / _name(made_from)

    def _trim(self, newest: Path) -> None:
        entries = []
        for path in self._root.glob("*/*"):
            with suppress(FileNotFoundError):  # another process was faster
                entries.append(((found := path.stat()).st_mtime_ns, found.st_size, path))
        entries.sort()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self._bytes_max:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def tables_cache(folder: Path | None = None) -> Cache:
    """The cache of modulation tables that are not in a bundle, one group per digest of modulation weights.

    ``folder`` None is ``modulation`` in ``qie_home()``.
    """
    return Cache(folder or _in_home("modulation"), bytes_max=_TABLES_BYTES)


def encoder_cache_on_disk(folder: Path | None = None) -> Cache:
    """The cache of embeddings of images and prompts, one group per key of the engine that computed them.

    They tell about the images and instructions that they were made from, so nothing is kept here unless a person chose
    it. It holds at most 2 GiB.

    ``folder`` None is ``encoder`` in ``qie_home()``.
    """
    return Cache(folder or _in_home("encoder"), bytes_max=_ENCODER_BYTES, private=True)


def _in_home(name: str) -> Path:
    try:
        return qie_home() / name
    except BundleError:  # nothing is kept
        return Path(os.devnull) / name


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(made_from: str, content: memoryview) -> bytes:
    """sha256 of the content and of what it was made from."""
    digest = hashlib.sha256(hashlib.sha256(made_from.encode()).digest())
    digest.update(content)
    return digest.digest()
