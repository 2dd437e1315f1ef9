"""A graph's weights as one file of external data, made of tensors that come in any order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.placed_file import PlacedFile, disk_error
from qie.compiler.weights.prepare import pieces
from qie.compiler.weights.weight import Weight
from qie.engines.progress import StageProgress, no_progress

__all__ = ["CHUNK_BYTES", "Entry", "WeightFile", "WeightsFile", "total_bytes"]

_PAGE = 4096
"""Alignment in bytes of a tensor of at least this size: a page, so that a runtime can map it."""

_LINE = 64
"""Alignment in bytes of a smaller tensor: a cache line."""

CHUNK_BYTES = 1 << 25
"""Bytes prepared and written at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: name of the weight.
        offset: where the tensor starts, in bytes.
        length: its size in bytes.
    """

    name: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """A written file of external data.

    Attributes:
        path: the file.
        bytes: its size.
        sha256: sha256 of its content, in hex.
        entries: its tensors in order.
    """

    path: Path
    bytes: int
    sha256: str
    entries: tuple[Entry, ...]

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and length in bytes by name."""
        return {entry.name: (entry.offset, entry.length) for entry in self.entries}


class WeightsFile:
    """A ``Consumer`` that prepares the tensors of ``weights`` and writes each at its place.

    The file appears under its name when ``finish`` is called. A ``with`` statement reserves the room for it, and leaves
    nothing behind where it is not finished. Every method may raise ``BuildError``: the disk is full or the file cannot
    be written.
    """

    def __init__(self, weights: Sequence[Weight], path: Path, *, progress: StageProgress = no_progress) -> None:
        """Plan the file.

        Args:
            weights: in the order of the file, with distinct names.
            path: the file, in an existing folder.
            progress: called with the bytes written and the bytes in all, by the thread that calls ``take``.
        """
        self._path, self._progress = path, progress
        self._entries = _plan(weights)
        self._total = _end(self._entries)
        assert len({entry.name for entry in self._entries}) == len(weights), "two weights of one name"
        self._of_source: dict[tuple[Subfolder, str], list[tuple[Weight, Entry]]] = {}
        for weight, entry in zip(weights, self._entries, strict=True):
            self._of_source.setdefault((weight.subfolder, weight.source), []).append((weight, entry))
        self._file: PlacedFile | None = None
        self._written: WeightFile | None = None

    def __enter__(self) -> "WeightsFile":
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sources(self) -> tuple[tuple[Subfolder, str], ...]:
        """Subfolder and name of every tensor that it takes."""
        return tuple(self._of_source)

    @property
    def written(self) -> WeightFile:
        """The finished file."""
        assert self._written is not None, f"{self._path} is not finished"
        return self._written

    def take(self, subfolder: Subfolder, name: str, tensor: NDArray[Any]) -> None:
        """Prepare and write everything that is made of one tensor, which must not change any more.

        Raises:
            CheckpointError: the tensor has another shape, or is not floating-point or finite.
        """
        file = self._open()
        amax: dict[Any, NDArray[Any]] = {}
        try:
            for weight, entry in self._of_source[subfolder, name]:
                offset = entry.offset
                for piece in pieces(weight, tensor, most=CHUNK_BYTES, amax=amax):
                    file.write(offset, piece)
                    offset += piece.size
                assert offset == entry.offset + entry.length, f"{weight.name} has another size"
        except BaseException as problem:
            self._fail(problem)
            raise

    def finish(self) -> None:
        """Complete the file and give it its name."""
        file = self._open()
        try:
            sha256 = file.publish()
        except BaseException as problem:
            self._fail(problem)
            raise
        self._written = WeightFile(path=self._path, bytes=self._total, sha256=sha256, entries=self._entries)

    def close(self) -> None:
        """Remove what was written of a file that was not finished."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> PlacedFile:
        if self._file is None:
            ends = [0, *(entry.offset + entry.length for entry in self._entries)]
            gaps = [(end, entry.offset) for end, entry in zip(ends, self._entries, strict=False) if end < entry.offset]
            try:
                self._file = PlacedFile(self._path, self._total, gaps, progress=self._progress)
            except OSError as error:
                raise disk_error(error, self._path, self._total) from error
        return self._file

    def _fail(self, problem: BaseException) -> None:
        self.close()
        if isinstance(problem, OSError):
            raise disk_error(problem, self._path, self._total) from problem


def total_bytes(weights: Sequence[Weight]) -> int:
    """Size in bytes of the file of these weights, alignment included."""
    return _end(_plan(weights))


def _end(entries: Sequence[Entry]) -> int:
    return entries[-1].offset + entries[-1].length if entries else 0


def _plan(weights: Sequence[Weight]) -> tuple[Entry, ...]:
    entries = []
    end = 0
    for weight in weights:
        length = _length(weight)
        alignment = _PAGE if length >= _PAGE else _LINE
        offset = -(-end // alignment) * alignment
        entries.append(Entry(name=weight.name, offset=offset, length=length))
        end = offset + length
    return tuple(entries)


def _length(weight: Weight) -> int:
    """Bytes of a weight; two 4-bit values share one."""
    count = math.prod(weight.shape)
    return -(-count // 2) if weight.dtype == "int4" else count * np.dtype(weight.dtype).itemsize
