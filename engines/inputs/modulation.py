"""Modulation tables: the modulation of every block at every step of a schedule.

A third of the transformer's parameters depend only on the timestep. They are not in the engine; a schedule's tables
are read from the bundle, or computed here by streaming those weights once, block by block, and then cached.

Formulas: diffusers ``models/embeddings.py`` (get_timestep_embedding, TimestepEmbedding) and
``models/transformers/transformer_qwenimage.py`` (QwenTimestepProjEmbeddings, QwenImageTransformerBlock.forward).
Shape suffixes: S steps, D width, L layers, M rows per block.
"""

import hashlib
import math
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qie.engines.bfloat16 import narrow, widen
from qie.engines.bundle.bundle import Bundle, check_file
from qie.engines.bundle.manifest import ModulationRecord
from qie.engines.bundle.modulation_rows import CHANNELS, EMBEDDER, HALVES, MODULES, NORM_OUT, module_slice, streams
from qie.engines.cache import tables_cache
from qie.engines.errors import BundleError
from qie.engines.inputs.stored_schedules import SCHEDULES, made_from, missing_tables, stored_dtype, table_name
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "BundleModulation",
    "ModulationInputs",
    "ModulationShape",
    "ModulationWeights",
    "Tables",
    "block_rows",
    "compute_tables",
    "conditioning",
    "modulation_inputs",
    "modulation_tables",
    "output_rows",
    "silu",
    "split_tables",
    "timesteps",
]

Array = NDArray[np.float32]
TableDtype = Literal["float32", "bfloat16"]


class ModulationShape(Protocol):
    """Dimensions that the tables depend on; a ``ModulationRecord`` and a transformer's config have them."""

    @property
    def layers(self) -> int:
        """Blocks of the transformer."""
        ...

    @property
    def width(self) -> int:
        """Width of the transformer."""
        ...

    @property
    def zero_cond_t(self) -> bool:
        """Whether references have modulation of their own, at timestep 0."""
        ...


class ModulationWeights(Protocol):
    """The modulation weights by the names of the checkpoint."""

    def read(self, name: str) -> Array:
        """A tensor as float32, in the checkpoint's [out, in] layout."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """The modulation of each step, contiguous step by step.

    Both are float32, or bfloat16 as its bits (uint16).

    Attributes:
        blocks: [S, L, M * D], of every block.
        out: [S, 2 * D], of the output norm.
    """

    blocks: NDArray[Any]
    out: NDArray[Any]


def modulation_tables(
    bundle: Bundle,
    sigmas: Array,
    *,
    dtype: TableDtype = "float32",
    cache: Path | None = None,
    progress: StageProgress = no_progress,
) -> Tables:
    """Tables for the schedule ``sigmas`` [S + 1] of ``bundle``: stored, cached, or computed and cached.

    What was stored is compared with its digest; a damaged table counts as absent. The weights are compared with theirs
    before the first tables are computed. A bundle without weights has the stored tables alone. Stored tables in
    bfloat16, which go to a GPU at once, are mapped from their file and not copied.

    Args:
        bundle: whose tables and modulation weights are read.
        sigmas: float32 [S + 1], from ``schedule.sigmas``.
        dtype: of the tables, as the engine reads them.
        cache: folder of tables that are not in the bundle; None is ``modulation`` in ``qie_home()``.
        progress: called with (blocks done, blocks) while computing.

    Raises:
        BundleError: the modulation weights are damaged, or give tables that are not finite; or a table is damaged, and
            there are no weights.
        RequestError: there is no such table, and there are no weights.
    """
    record, steps = bundle.manifest.model.modulation, len(sigmas) - 1
    name = f"{SCHEDULES}/{table_name(record, sigmas)}"
    stored = _bundled(bundle, name, steps, mapped=dtype == "bfloat16")
    if stored is not None:
        return _as_read(stored, record, dtype)
    if record.file is None:
        if all(file.path != name for file in bundle.manifest.schedules):
            raise missing_tables(bundle.manifest, steps)
        raise BundleError(f"{bundle.path / name} is damaged; build the bundle again with `qie build`")
    tables = tables_cache(cache)
    group, decided_by = record.identity, made_from(record, sigmas)
    content = tables.load(group, decided_by)
    if content is not None and len(content) == steps * record.values * stored_dtype(record).itemsize:
        return _as_read(np.frombuffer(content, stored_dtype(record)).reshape(steps, -1), record, dtype)
    check_file(bundle, record.file)
    weights = bundle.folder.read(lambda folder: BundleModulation(folder, record))
    flat = compute_tables(weights, record, sigmas, progress=progress)
    if not np.isfinite(flat).all():
        raise BundleError(
            f"the modulation weights of {bundle.path} give values that are not finite; build the bundle again with "
            "`qie build`"
        )
    kept = _stored(flat, record)
    tables.store(group, decided_by, memoryview(kept.tobytes()))
    return _as_read(kept, record, dtype)


def _as_read(stored: NDArray[Any], record: ModulationRecord, dtype: TableDtype) -> Tables:
    """``stored`` [S, everything] as tables of ``dtype``."""
    if dtype == "float32":
        return split_tables(widen(stored), record)
    return split_tables(stored if stored.dtype == np.uint16 else narrow(stored), record)


def compute_tables(
    weights: ModulationWeights,
    shape: ModulationShape,
    sigmas: Array,
    *,
    progress: StageProgress = no_progress,
) -> Array:
    """Tables of the schedule ``sigmas`` [S + 1], with one block's weights in memory at a time.

    The rows of a block are those of ``modulation_rows``, with 1 + scale in place of scale. The sum is taken in float32,
    so that a small 1 + scale does not lose precision in bfloat16 tables.

    Args:
        weights: the modulation weights.
        shape: dimensions of the transformer.
        sigmas: float32 sigmas of the schedule, the last of which is 0.
        progress: called with the blocks done and the blocks in all.

    Returns:
        float32 [S, L * M * D + 2 * D]: every block's rows, then 1 + scale and shift of the output norm.
    """
    inputs = modulation_inputs(weights, timesteps(sigmas))
    rows: list[Array] = []
    for layer in range(shape.layers):
        rows += _stream_rows(weights, shape, inputs, layer)
        progress(layer + 1, shape.layers)
    rows.append(output_rows(weights, shape, inputs))
    return np.ascontiguousarray(np.concatenate(rows, axis=1))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModulationInputs:
    """What every modulation layer reads.

    Attributes:
        steps: [S, D] for the timesteps of the steps.
        zero: [S, D] for timestep 0, which references have.
    """

    steps: Array
    zero: Array


def modulation_inputs(weights: ModulationWeights, timestep_S: Array) -> ModulationInputs:
    """What the modulation layers read at the timesteps ``timestep_S``."""
    steps_SD = conditioning(weights, timestep_S)
    zero_1D = conditioning(weights, np.zeros(1, np.float32))
    return ModulationInputs(steps=steps_SD, zero=np.broadcast_to(zero_1D, steps_SD.shape))


def block_rows(weights: ModulationWeights, shape: ModulationShape, inputs: ModulationInputs, layer: int) -> Array:
    """The modulation of one block at every step, float32 [S, M * D]; see ``compute_tables``."""
    return np.concatenate(_stream_rows(weights, shape, inputs, layer), axis=1)


def output_rows(weights: ModulationWeights, shape: ModulationShape, inputs: ModulationInputs) -> Array:
    """1 + scale and shift of the output norm at every step, float32 [S, 2 * D]."""
    last = _linear(weights, NORM_OUT, inputs.steps)
    last[:, : shape.width] += 1
    return last


def _stream_rows(
    weights: ModulationWeights, shape: ModulationShape, inputs: ModulationInputs, layer: int
) -> list[Array]:
    """The rows of each stream of a block, each module's weights read once."""
    rows: list[Array] = []
    read, weight, bias = "", np.empty(0, np.float32), np.empty(0, np.float32)
    for stream in streams(references=shape.zero_cond_t):
        name = f"transformer_blocks.{layer}.{MODULES[stream]}.1"
        if name != read:
            weight = bias  # the last one is not held while the next one is read
            read, weight, bias = name, weights.read(f"{name}.weight").T, weights.read(f"{name}.bias")
        values = (inputs.zero if stream == "references" else inputs.steps) @ weight + bias
        for half in HALVES:
            values[:, module_slice(half, "scale", shape.width)] += 1
        rows.append(values)
    return rows


def timesteps(sigmas: Array) -> Array:
    """The model's timestep at each step, float32 [S]: sigma * 1000 / 1000, rounded as diffusers rounds it."""
    return (sigmas[:-1] * np.float32(1000)) / np.float32(1000)


def split_tables(flat: NDArray[Any], shape: ModulationShape) -> Tables:
    """Tables of ``flat`` [S, L * M * D + 2 * D]."""
    blocks, out = np.split(flat, [flat.shape[1] - 2 * shape.width], axis=1)
    return Tables(blocks=blocks.reshape(len(flat), shape.layers, -1), out=out)


class BundleModulation:
    """The modulation weights of a bundle, read one tensor at a time.

    They are not mapped: a disk that fails raises an error, and kills nothing.
    """

    def __init__(self, folder: Path, record: ModulationRecord) -> None:
        assert record.file is not None, "a bundle without modulation weights"
        self._path = folder / record.file.path
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._tensors = {t.name: t for t in record.tensors}

    def read(self, name: str) -> Array:
        """A tensor as float32.

        Raises:
            BundleError: see ``stored``.
        """
        return widen(self.stored(name))

    def stored(self, name: str) -> NDArray[np.generic]:
        """A tensor as it is stored: float32, or bfloat16 as its bits (uint16). Threads may read at once.

        Raises:
            BundleError: the file cannot be read, or is cut short.
        """
        tensor = self._tensors[name]
        values = np.empty(tensor.shape, np.uint16 if tensor.dtype == "bfloat16" else np.float32)
        content = values.reshape(-1).view(np.uint8).data
        done, problem = 0, "it is cut short"
        try:
            while count := os.preadv(self._descriptor, [content[done:]], tensor.offset + done):
                done += count
        except OSError as failure:
            problem = str(failure.strerror)
        if done < len(content):
            raise BundleError(f"{self._path} cannot be read ({problem}); build the bundle again with `qie build`")
        return values


def _linear(weights: ModulationWeights, name: str, x: Array) -> Array:
    """``x @ weight.T + bias`` with the checkpoint's [out, in] weight."""
    return x @ weights.read(f"{name}.weight").T + weights.read(f"{name}.bias")


def conditioning(weights: ModulationWeights, timestep_S: Array) -> Array:
    """Silu of the timestep's embedding, float32 [S, D]: the input of every modulation layer."""
    half = CHANNELS // 2
    frequencies = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.float32(1000) * (timestep_S[:, None] * frequencies)
    channels = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    hidden: Array = silu(_linear(weights, EMBEDDER[0], channels))
    return silu(_linear(weights, EMBEDDER[1], hidden))


def _bundled(bundle: Bundle, name: str, steps: int, *, mapped: bool) -> NDArray[np.generic] | None:
    """The array in the bundle's file of tables ``name``; None where it is absent, damaged or of other steps."""
    listed = next((file for file in bundle.manifest.schedules if file.path == name), None)
    if listed is None:
        return None
    try:
        content: NDArray[np.uint8] = bundle.folder.read(
            lambda folder: np.memmap(folder / name, np.uint8, "r") if mapped else np.fromfile(folder / name, np.uint8)
        )
    except (OSError, ValueError):  # absent, empty
        return None
    record = bundle.manifest.model.modulation
    header = len(content) - steps * record.values * stored_dtype(record).itemsize
    in_file = 10 + int.from_bytes(content[8:10].tobytes(), "little")  # numpy/lib/format.py, version 1.0
    if hashlib.sha256(content.data).hexdigest() != listed.sha256 or header != in_file:
        return None
    return np.frombuffer(content, stored_dtype(record), offset=header).reshape(steps, record.values)


def _stored(flat: Array, record: ModulationRecord) -> NDArray[np.generic]:
    return narrow(flat) if record.tables == "bfloat16" else flat


def silu(x: Array) -> Array:
    """Compute x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp overflows to infinity, and the quotient is the 0 that it should be
        return np.asarray(x / (np.float32(1) + np.exp(-x)), np.float32)
