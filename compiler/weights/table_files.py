"""The files of modulation tables, written while the modulation weights pass by, all schedules together."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qie.compiler.weights.weight import DType
from qie.engines.bfloat16 import narrow, widen
from qie.engines.bundle.manifest import FileRecord, ModulationRecord, file_record
from qie.engines.bundle.modulation_rows import HALVES, MODULES, NORM_OUT, ROWS, module_slice, rows, streams
from qie.engines.errors import CheckpointError
from qie.engines.inputs.modulation import ModulationShape, conditioning, timesteps
from qie.engines.inputs.stored_schedules import SCHEDULES, table_name

__all__ = ["TIMESTEPS_MAX", "TableFiles", "write_at"]

Floats = NDArray[np.float32]

TIMESTEPS_MAX = 1024
"""Timesteps that are multiplied together: 75 MB of products with a weight of the published model."""

_CHUNK = 3072
"""Rows of a weight that are in memory as float32: 38 MB where the model has as many columns."""


class TableFiles:
    """The tables of several schedules, a file each: [S, every block's rows, then two of the output norm].

    ``modulation_rows`` has the order of a block's rows; all scales are stored as 1 + scale. A file is written row by
    row in place, and never in memory as a whole.
    """

    def __init__(self, shape: ModulationShape, folder: Path, *, schedules: Sequence[Floats], dtype: DType) -> None:
        """Start the files of ``schedules``, sigmas, float32 [S + 1], in ``folder``; equal ones are one file.

        Raises:
            OSError: a file cannot be written.
        """
        self._shape, self._folder, self._dtype = shape, folder, dtype
        self._schedules = list({values.tobytes(): values for values in schedules}.values())
        zero = np.zeros(1, np.float32)  # of the references
        every = np.concatenate([zero, *(timesteps(values) for values in self._schedules)])
        self._timesteps, places = np.unique(every, return_inverse=True)
        self._zero, *_ = places
        self._steps = np.split(places[1:], np.cumsum([len(values) - 1 for values in self._schedules])[:-1])
        self._x_RD: Floats | None = None
        self._block = rows(references=shape.zero_cond_t) * shape.width
        self._values = shape.layers * self._block + 2 * shape.width
        self._item = np.dtype(np.uint16 if dtype == "bfloat16" else np.float32)
        (folder / SCHEDULES).mkdir(exist_ok=True)
        self._headers = [self._create(number, len(steps)) for number, steps in enumerate(self._steps)]

    def start(self, embedder: Mapping[str, Floats]) -> None:
        """Take the tensors of the timestep's embedder, by their names."""
        with np.errstate(over="ignore", invalid="ignore"):
            self._x_RD = conditioning(_Tensors(embedder), self._timesteps)

    def products(self, weight_OD: NDArray[Any]) -> Iterator[tuple[int, Floats]]:
        """The products of all distinct timesteps with a weight, bfloat16 or float32, in parts.

        Yields:
            The number of the first timestep of a part, and the products [R, O].
        """
        assert self._x_RD is not None, "the embedder comes before every other tensor"
        for first in range(0, len(self._x_RD), TIMESTEPS_MAX):
            yield first, _multiply(self._x_RD[first : first + TIMESTEPS_MAX], weight_OD)

    def write(self, linear: str, first: int, values_RO: Floats) -> None:
        """Write what the linear ``linear`` gives, with its bias, for the timesteps from number ``first`` on.

        Args:
            linear: its name.
            first: number of the first timestep.
            values_RO: its outputs, which are changed.

        Raises:
            CheckpointError: a value is not finite.
            OSError: a file cannot be written.
        """
        for gain in self._gains(linear):
            values_RO[:, gain] += 1
        if not np.isfinite(values_RO).all():
            raise CheckpointError(
                f"{linear} gives modulation that is not finite; download the checkpoint again, or leave out the LoRA "
                "that causes it"
            )
        stored_RO = narrow(values_RO) if self._dtype == "bfloat16" else values_RO
        for table, (header, steps) in enumerate(zip(self._headers, self._steps, strict=True)):
            with self._path(table).open("r+b", buffering=0) as file:
                for column, is_of_references in self._columns(linear):
                    for number, step in enumerate(steps):
                        row = (self._zero if is_of_references else step) - first
                        if 0 <= row < len(stored_RO):
                            place = header + (number * self._values + column) * self._item.itemsize
                            write_at(file.fileno(), stored_RO[row], place)

    def finish(self, record: ModulationRecord) -> tuple[FileRecord, ...]:
        """Name the files by what they are made from, and describe them.

        Raises:
            OSError: a file cannot be read.
        """
        names = [f"{SCHEDULES}/{table_name(record, values)}" for values in self._schedules]
        for number, name in enumerate(names):
            self._path(number).rename(self._folder / name)
        return tuple(file_record(self._folder, name) for name in names)

    def _create(self, number: int, steps: int) -> int:
        """Start the file of a table; the size of its header."""
        with self._path(number).open("wb") as file:
            described = {"descr": self._item.str, "fortran_order": False, "shape": (steps, self._values)}
            np.lib.format.write_array_header_1_0(file, described)
            header = file.tell()
            file.truncate(header + steps * self._values * self._item.itemsize)
        return header

    def _path(self, number: int) -> Path:
        return self._folder / SCHEDULES / f"{number}.part"

    def _gains(self, linear: str) -> list[slice]:
        """Where the outputs of a linear are scales."""
        width = self._shape.width
        return [slice(0, width)] if linear == NORM_OUT else [module_slice(half, "scale", width) for half in HALVES]

    def _columns(self, linear: str) -> list[tuple[int, bool]]:
        """Where the outputs of a linear start in a row of a table, and whether they are those of the timestep 0."""
        if linear == NORM_OUT:
            return [(self._shape.layers * self._block, False)]
        _, layer, module, _ = linear.split(".")
        names = streams(references=self._shape.zero_cond_t)
        return [
            (int(layer) * self._block + place * ROWS * self._shape.width, stream == "references")
            for place, stream in enumerate(names)
            if MODULES[stream] == module
        ]


def _multiply(x_RD: Floats, weight_OD: NDArray[Any]) -> Floats:
    """The product [R, O], with few rows of the weight as float32 at a time."""
    product_RO = np.empty((len(x_RD), len(weight_OD)), np.float32)
    for start in range(0, len(weight_OD), _CHUNK):
        part = weight_OD[start : start + _CHUNK]
        wide = widen(part.view(np.uint16) if part.dtype == ml_dtypes.bfloat16 else part)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused when it is written
            np.matmul(x_RD, wide.T, out=product_RO[:, start : start + _CHUNK])
    return product_RO


def write_at(descriptor: int, values: NDArray[Any], offset: int) -> None:
    """Write the bytes of ``values``, contiguous, at ``offset`` of an open file.

    Raises:
        OSError: the file cannot be written.
    """
    content = values.reshape(-1).view(np.uint8).data
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


class _Tensors:
    """Tensors in memory as ``ModulationWeights``."""

    def __init__(self, tensors: Mapping[str, Floats]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Floats:
        return self._tensors[name]
