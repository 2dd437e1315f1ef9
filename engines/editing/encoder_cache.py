"""A cache of what the encoders of an edit computed: embeddings of images and of prompts.

NumPy is imported with the first entry, not with this file: ``qie.EncoderCache`` costs nothing.
"""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qie.engines.cache import Cache
from qie.engines.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EncoderCache", "EncoderKey"]

_BYTES = 256 << 20
"""Most that a cache keeps in memory by default: embeddings of seventy prompts of the published model about one image
(260 tokens of 3584 float32 values), of thirteen of its first generation, which sees an image in 1369 tokens."""

_HEADER = 4
"""Values of int64 before an entry on disk: the number of its dims, then these, then zeros. They take 32 bytes, as the
digest before them does, so that the numbers behind are aligned as those of any other array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderKey:
    """The key of an entry.

    Attributes:
        engine: key of the engine that computes it, under which entries lie together on disk.
        digest: sha256 of everything that decides it.
    """

    engine: str
    digest: str


class EncoderCache:
    """Embeddings of images and prompts, the least recently used of which are dropped beyond ``bytes_max``.

    Editors and threads may share one. Two that miss the same entry at the same time both compute it, and equal bytes
    replace each other. An entry is a read-only array that nobody can make writable.
    """

    def __init__(self, *, bytes_max: int = _BYTES, disk: Cache | None = None) -> None:
        """An empty cache.

        Args:
            bytes_max: most that is kept in memory; an array that is larger than that is not kept there. 0 keeps
                nothing.
            disk: keeps entries beyond this process, such as ``encoder_cache_on_disk()``; None keeps none.

        Raises:
            RequestError: ``bytes_max`` is no whole number, or less than nothing.
        """
        if type(bytes_max) is not int or bytes_max < 0:
            raise RequestError(
                f"an encoder cache of {bytes_max!r} bytes was requested; give 0 for none, or a larger whole number",
                option="bytes_max",
            )
        self._bytes_max, self._disk = bytes_max, disk
        self._entries: OrderedDict[EncoderKey, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    @property
    def keeps(self) -> bool:
        """Whether it keeps anything at all, in memory or on disk."""
        return self._bytes_max > 0 or self._disk is not None

    @property
    def hits(self) -> int:
        """Entries that were asked for and found."""
        return self._hits

    @property
    def misses(self) -> int:
        """Entries that were asked for and not found."""
        return self._misses

    @property
    def bytes(self) -> int:
        """Memory of the entries."""
        with self._lock:
            return self._total()

    def load(self, key: EncoderKey) -> "NDArray[np.float32] | None":
        """The entry of ``key``, read-only; None where there is none, or where it is damaged on disk."""
        with self._lock:
            array = self._entries.get(key)
            if array is not None:
                self._entries.move_to_end(key)
        if array is None and self._disk is not None:
            content = self._disk.load(key.engine, _made_from(key))
            array = None if content is None else _unpacked(content)
            if array is not None:
                self._keep(key, array)
        with self._lock:
            self._hits += array is not None
            self._misses += array is None
        return array

    def store(self, key: EncoderKey, array: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """Keep ``array``, and return a read-only copy of it.

        What is not finite is not kept: a failure of a GPU that passes would stay.
        """
        import numpy as np

        assert array.dtype == np.float32, array.dtype
        entry = np.frombuffer(array.tobytes(), np.float32).reshape(array.shape)
        if np.isfinite(entry).all():
            self._keep(key, entry)
            if self._disk is not None:
                self._disk.store(key.engine, _made_from(key), _packed(entry))
        return entry

    def clear(self) -> None:
        """Drop what is in memory; what is on disk stays, for `qie clean`."""
        with self._lock:
            self._entries.clear()

    def _keep(self, key: EncoderKey, array: "NDArray[np.float32]") -> None:
        with self._lock:
            self._entries.pop(key, None)
            if self._bytes_max > 0 and array.nbytes <= self._bytes_max:
                self._entries[key] = array
            while self._total() > self._bytes_max:
                self._entries.popitem(last=False)

    def _total(self) -> int:
        return sum(array.nbytes for array in self._entries.values())


def _made_from(key: EncoderKey) -> str:
    return f"encoder entry 1 {key.engine} {key.digest}"


def _packed(array: "NDArray[np.float32]") -> memoryview:
    """Shape and numbers of ``array``, little-endian."""
    import numpy as np

    header = np.zeros(_HEADER, "<i8")
    header[: array.ndim + 1] = (array.ndim, *array.shape)
    return memoryview(header.tobytes() + array.astype("<f4", copy=False).tobytes())


def _unpacked(content: memoryview) -> "NDArray[np.float32] | None":
    """The array that ``_packed`` wrote, over the memory of ``content``; None for anything else."""
    import numpy as np

    if len(content) < 8 * _HEADER:
        return None
    dims, *sizes = np.frombuffer(content[: 8 * _HEADER], "<i8").tolist()
    numbers = content[8 * _HEADER :]
    possible = 0 <= dims < _HEADER and min(sizes) >= 0 and max(sizes) < 1 << 31
    if not possible or 4 * math.prod(sizes[:dims]) != len(numbers):
        return None
    return np.frombuffer(numbers, "<f4").reshape(sizes[:dims]).astype(np.float32, copy=False)
