"""Modulation tables: the modulation of every block at every step of a schedule.

A third of the transformer's parameters depend only on the timestep. They are not in the engine; a schedule's tables
are read from the bundle, or computed here by streaming those weights once, block by block, and then cached.

Formulas: diffusers ``models/embeddings.py`` (get_timestep_embedding, TimestepEmbedding) and
``models/transformers/transformer_qwenimage.py`` (QwenTimestepProjEmbeddings, QwenImageTransformerBlock.forward).
Shape suffixes: S steps, D width, L layers, M rows per block.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import ModulationRecord
from qie.engines.bundle.modulation_rows import HALVES, MODULES, module_slice, streams
from qie.engines.files import qie_home, replacing
from qie.engines.inputs.bfloat16 import narrow, widen
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "CHANNELS",
    "SCHEDULES",
    "BundleModulation",
    "ModulationShape",
    "ModulationWeights",
    "Tables",
    "compute_tables",
    "modulation_tables",
    "silu",
    "split_tables",
    "store_tables",
    "table_name",
    "timesteps",
]

SCHEDULES = "schedules"
"""Folder of precomputed tables in a bundle."""

CHANNELS = 256
"""Sinusoidal channels of a timestep (transformer_qwenimage.py, QwenTimestepProjEmbeddings)."""

Array = NDArray[np.float32]


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

    Attributes:
        blocks: float32 [S, L, M * D], of every block.
        out: float32 [S, 2 * D], of the output norm.
    """

    blocks: Array
    out: Array


def modulation_tables(
    folder: Path,
    record: ModulationRecord,
    sigmas: Array,
    *,
    cache: Path | None = None,
    progress: StageProgress = no_progress,
) -> Tables:
    """Tables for the schedule ``sigmas`` [S + 1] of the bundle ``folder``: stored, cached, or computed and cached.

    A damaged file counts as absent; where the cache cannot be written, the next call computes again.

    Args:
        folder: of the bundle.
        record: the bundle's modulation weights.
        sigmas: float32 [S + 1], from ``schedule.sigmas``.
        cache: folder of tables that are not in the bundle; None is ``modulation`` in ``qie_home()``.
        progress: called with (blocks done, blocks) while computing.
    """
    cache = qie_home() / "modulation" if cache is None else cache
    name = table_name(record, sigmas)
    for place in (folder / SCHEDULES / name, cache / name):
        stored = _load(place, record, len(sigmas) - 1)
        if stored is not None:
            return split_tables(widen(stored), record)
    flat = compute_tables(BundleModulation(folder, record), record, sigmas, progress=progress)
    with contextlib.suppress(OSError):
        store_tables(flat, record, cache / name)
    return split_tables(widen(_stored(flat, record)), record)


def table_name(record: ModulationRecord, sigmas: Array) -> str:
    """File name of the tables of ``sigmas``: a digest of everything that decides their content."""
    decided_by = f"{record.file.sha256} {record.zero_cond_t} {record.tables} {sigmas.astype('<f4').tobytes().hex()}"
    return f"{hashlib.sha256(decided_by.encode()).hexdigest()[:32]}.npy"


def store_tables(flat: Array, record: ModulationRecord, path: Path) -> None:
    """Write ``flat`` [S, everything] in the dtype in which the engine uses it, bfloat16 as its bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, _stored(flat, record), allow_pickle=False)


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
    conditioning_SD = _conditioning(weights, timesteps(sigmas))
    zero_SD = np.broadcast_to(_conditioning(weights, np.zeros(1, np.float32)), conditioning_SD.shape)
    rows: list[Array] = []
    for layer in range(shape.layers):
        for stream in streams(references=shape.zero_cond_t):
            x_SD = zero_SD if stream == "references" else conditioning_SD
            values = _linear(weights, f"transformer_blocks.{layer}.{MODULES[stream]}.1", x_SD)
            for half in HALVES:
                values[:, module_slice(half, "scale", shape.width)] += 1
            rows.append(values)
        progress(layer + 1, shape.layers)
    last = _linear(weights, "norm_out.linear", conditioning_SD)
    last[:, : shape.width] += 1
    rows.append(last)
    return np.ascontiguousarray(np.concatenate(rows, axis=1))


def timesteps(sigmas: Array) -> Array:
    """The model's timestep at each step, float32 [S]: sigma * 1000 / 1000, rounded as diffusers rounds it."""
    return (sigmas[:-1] * np.float32(1000)) / np.float32(1000)


def split_tables(flat: Array, shape: ModulationShape) -> Tables:
    """Tables of float32 ``flat`` [S, L * M * D + 2 * D]."""
    blocks, out = np.split(flat, [flat.shape[1] - 2 * shape.width], axis=1)
    return Tables(blocks=blocks.reshape(len(flat), shape.layers, -1), out=out)


class BundleModulation:
    """The modulation weights of a bundle, mapped and widened one tensor at a time."""

    def __init__(self, folder: Path, record: ModulationRecord) -> None:
        self.mapped = np.memmap(folder / record.file.path, dtype=np.uint8, mode="r")
        self._tensors = {t.name: t for t in record.tensors}

    def read(self, name: str) -> Array:
        """A tensor as float32."""
        tensor = self._tensors[name]
        dtype = np.dtype(np.uint16 if tensor.dtype == "bfloat16" else np.float32)
        count = int(np.prod(tensor.shape)) * dtype.itemsize
        raw = self.mapped[tensor.offset : tensor.offset + count].view(dtype).reshape(tensor.shape)
        return widen(raw)


def _linear(weights: ModulationWeights, name: str, x: Array) -> Array:
    """``x @ weight.T + bias`` with the checkpoint's [out, in] weight."""
    return x @ weights.read(f"{name}.weight").T + weights.read(f"{name}.bias")


def _conditioning(weights: ModulationWeights, timestep_S: Array) -> Array:
    """Silu of the timestep's embedding, float32 [S, D]: the input of every modulation layer."""
    half = CHANNELS // 2
    frequencies = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.float32(1000) * (timestep_S[:, None] * frequencies)
    channels = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    hidden: Array = silu(_linear(weights, "time_text_embed.timestep_embedder.linear_1", channels))
    return silu(_linear(weights, "time_text_embed.timestep_embedder.linear_2", hidden))


def _load(path: Path, record: ModulationRecord, steps: int) -> NDArray[np.generic] | None:
    """The array in a file of tables; None where it is absent, damaged or of other steps."""
    try:
        stored: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    shape = (steps, record.values)
    dtype = np.uint16 if record.tables == "bfloat16" else np.float32
    return stored if stored.shape == shape and stored.dtype == dtype else None


def _stored(flat: Array, record: ModulationRecord) -> NDArray[np.generic]:
    return narrow(flat) if record.tables == "bfloat16" else flat


def silu(x: Array) -> Array:
    """Compute x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp overflows to infinity, and the quotient is the 0 that it should be
        return np.asarray(x / (np.float32(1) + np.exp(-x)), np.float32)
