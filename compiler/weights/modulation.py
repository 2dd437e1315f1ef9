"""The modulation weights: which tensors they are, the tables and the file that are made of them, and a reader."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.recipe.schema import Modulation
from qie.compiler.weights.prepare import check_weights, prepare
from qie.compiler.weights.table_files import TableFiles, write_at
from qie.compiler.weights.weight import DType, Weight
from qie.engines.bundle.manifest import FileRecord, ModulationRecord, ModulationTensor, file_record
from qie.engines.bundle.modulation_rows import EMBEDDER, linears
from qie.engines.inputs.modulation import ModulationShape
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "MODULATION_FILE",
    "CheckpointModulation",
    "ModulationFile",
    "modulation_bytes",
    "modulation_weights",
    "write_modulation",
]

MODULATION_FILE = "modulation.weights"

_LINE = 64
"""Alignment in bytes of a tensor in the file: a cache line."""

Floats = NDArray[np.float32]


def modulation_weights(shape: ModulationShape, reader: TensorReader | None) -> tuple[Weight, ...]:
    """Every tensor that only the timestep reaches, in the checkpoint's own layout and names.

    A matrix is bfloat16 where ``reader`` has it so, and float32 elsewhere, as where a LoRA was added to it. Without a
    reader all are bfloat16, as published. Biases are float32, because smoothing adds 1 / s - 1 to them.
    """
    known = frozenset() if reader is None else frozenset(reader.names())

    def dtype(name: str) -> DType:
        return "float32" if reader is not None and name in known and reader.dtype(name) != "bfloat16" else "bfloat16"

    return tuple(
        weight
        for name, dims in linears(shape.layers, shape.width).items()
        for weight in (
            Weight(name=f"{name}.weight", subfolder="transformer", shape=dims, dtype=dtype(f"{name}.weight")),
            Weight(name=f"{name}.bias", subfolder="transformer", shape=dims[:1], dtype="float32"),
        )
    )


def modulation_bytes(weights: Sequence[Weight]) -> int:
    """Size in bytes of the file of ``weights``, alignment included."""
    return max(offset + _bytes(weight) for weight, offset in zip(weights, _offsets(weights), strict=True))


class ModulationFile:
    """Makes the tables of several schedules of the modulation weights, and a file of the weights where that is wanted.

    It is a ``Consumer``: it takes the tensors one by one in any order, but those of ``first`` before the others. What
    it keeps is the rows of a linear whose bias is still to come, so that memory does not depend on the number of blocks
    where a weight and its bias are neighbors. All schedules are computed with one product a linear, with each
    timestep once. What they have in common with ``compute_tables`` is every value but the order of its sum: they are
    equal to float32 rounding, and in tables in bfloat16 to one unit in the last place.

    Attributes:
        record: of the modulation; after ``finish``.
        tables: the files of the tables, one a distinct schedule; after ``finish``.
    """

    record: ModulationRecord
    tables: tuple[FileRecord, ...]

    def __init__(
        self,
        shape: ModulationShape,
        reader: TensorReader,
        folder: Path,
        *,
        schedules: Sequence[Floats],
        tables: DType,
        mode: Modulation,
    ) -> None:
        """Check the weights that ``reader`` has, and start the files.

        Args:
            shape: dimensions of the transformer.
            reader: its tensors, of which none is read here.
            folder: where to write the files.
            schedules: sigmas, float32 [S + 1], of each schedule.
            tables: dtype in which the transformer reads the tables.
            mode: "weights" also writes MODULATION_FILE.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or not floating-point.
            OSError: a file cannot be written.
        """
        weights = modulation_weights(shape, reader)
        check_weights(weights, {"transformer": reader})
        self._shape, self._folder, self._dtype, self._mode = shape, folder, tables, mode
        self._weights = {weight.name: weight for weight in weights}
        self._offsets = dict(zip(self._weights, _offsets(weights), strict=True))
        self._digests: dict[str, str] = {}
        self._embedder: dict[str, Floats] = {}
        self._products: dict[str, list[tuple[int, Floats]]] = {}
        self._biases: dict[str, Floats] = {}
        self._tables = TableFiles(shape, folder, schedules=schedules, dtype=tables)
        if mode == "weights":
            with (folder / MODULATION_FILE).open("wb") as file:
                file.truncate(modulation_bytes(weights))

    @property
    def sources(self) -> tuple[tuple[Subfolder, str], ...]:
        """Subfolder and name of every tensor that it takes."""
        return tuple((weight.subfolder, name) for name, weight in self._weights.items())

    @property
    def first(self) -> tuple[str, ...]:
        """Names of the tensors that it takes before the others: the timestep's embedder, 20 MB where published."""
        return tuple(f"{linear}.{kind}" for linear in EMBEDDER for kind in ("weight", "bias"))

    def take(self, subfolder: Subfolder, name: str, tensor: NDArray[Any]) -> None:
        """Take one tensor, which must not change any more; one that was taken before is not looked at.

        Raises:
            CheckpointError: the tensor is of another shape or not finite, or the modulation is not finite.
            OSError: a file cannot be written.
        """
        if name in self._digests:
            return
        prepared = prepare(self._weights[name], tensor)
        self._digests[name] = _digest(self._weights[name], prepared)
        if self._mode == "weights":
            with (self._folder / MODULATION_FILE).open("r+b", buffering=0) as file:
                write_at(file.fileno(), prepared, self._offsets[name])
        linear, _, kind = name.rpartition(".")
        if linear in EMBEDDER:
            self._embedder[name] = prepared.astype(np.float32)
            if len(self._embedder) == len(self.first):
                self._tables.start(self._embedder)
                self._embedder = {}
            return
        if kind == "bias":
            self._biases[linear] = prepared.astype(np.float32)
            self._write(linear, self._products.pop(linear, ()))
        elif linear in self._biases:
            self._write(linear, self._tables.products(prepared))
        else:
            self._products[linear] = list(self._tables.products(prepared))

    def finish(self) -> None:
        """Give the files their names and describe them; called after the last tensor.

        Raises:
            OSError: a file cannot be read or written.
        """
        assert self._digests.keys() == self._weights.keys(), "a tensor of the modulation was not taken"
        listed = "".join(f"{name} {digest}\n" for name, digest in sorted(self._digests.items()))
        has_file = self._mode == "weights"
        self.record = ModulationRecord(
            file=file_record(self._folder, MODULATION_FILE) if has_file else None,
            tables=self._dtype,
            tensors=tuple(self._tensors()) if has_file else (),
            layers=self._shape.layers,
            width=self._shape.width,
            zero_cond_t=self._shape.zero_cond_t,
            digest=hashlib.sha256(listed.encode()).hexdigest(),
        )
        self.tables = self._tables.finish(self.record)

    def _write(self, linear: str, products: Iterable[tuple[int, Floats]]) -> None:
        for first, product_RO in products:
            product_RO += self._biases[linear]
            self._tables.write(linear, first, product_RO)

    def _tensors(self) -> Iterator[ModulationTensor]:
        for name, weight in self._weights.items():
            yield ModulationTensor(
                name=name,
                dtype="bfloat16" if weight.dtype == "bfloat16" else "float32",
                shape=weight.shape,
                offset=self._offsets[name],
            )


def write_modulation(
    shape: ModulationShape,
    readers: Mapping[Subfolder, TensorReader],
    folder: Path,
    *,
    schedules: Sequence[Floats],
    tables: DType,
    mode: Modulation,
    progress: StageProgress = no_progress,
) -> ModulationFile:
    """Make a ``ModulationFile`` of all tensors that it takes, each read once in the order of the files; it is finished.

    Args:
        shape: dimensions of the transformer.
        readers: the checkpoint's tensors.
        folder: where to write the files.
        schedules: see ``ModulationFile``.
        tables: see ``ModulationFile``.
        mode: see ``ModulationFile``.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: a tensor is missing, of another shape or not finite.
        OSError: a file cannot be written.
    """
    file = ModulationFile(shape, readers["transformer"], folder, schedules=schedules, tables=tables, mode=mode)
    sizes = {weight.name: _bytes(weight) for weight in modulation_weights(shape, readers["transformer"])}
    done, total = 0, sum(sizes.values())
    reader = readers["transformer"]
    rest = reader.order(name for _, name in file.sources if name not in file.first)
    for name in (*file.first, *rest):
        file.take("transformer", name, reader.read(name))
        done += sizes[name]
        progress(done, total)
    file.finish()
    return file


class CheckpointModulation:
    """The modulation weights read from a checkpoint, rounded as ``ModulationFile`` stores them."""

    def __init__(
        self, shape: ModulationShape, reader: TensorReader, tensors: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        """Of ``reader``, of which ``tensors`` were read already where these are given, and no other is read."""
        self._read = reader.read if tensors is None else tensors.__getitem__
        self._weights = {weight.name: weight for weight in modulation_weights(shape, reader)}

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32.

        Raises:
            CheckpointError: the tensor is missing, of another shape or not finite.
        """
        return prepare(self._weights[name], self._read(name)).astype(np.float32)


def _bytes(weight: Weight) -> int:
    return math.prod(weight.shape) * (2 if weight.dtype == "bfloat16" else 4)


def _offsets(weights: Sequence[Weight]) -> list[int]:
    """Where each of ``weights`` starts in their file."""
    offsets, end = [], 0
    for weight in weights:
        offsets.append(-(-end // _LINE) * _LINE)
        end = offsets[-1] + _bytes(weight)
    return offsets


def _digest(weight: Weight, prepared: NDArray[Any]) -> str:
    """sha256 of a tensor as the file has it, with its dtype and shape."""
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}\n".encode())
    digest.update(prepared.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
