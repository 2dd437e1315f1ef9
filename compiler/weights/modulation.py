"""The modulation weights of a checkpoint: the file from which the runtime computes its tables, and a reader."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.prepare import prepare
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import DType, Weight
from qie.engines.bundle.manifest import FileRecord, ModulationRecord, ModulationTensor
from qie.engines.bundle.modulation_rows import linears
from qie.engines.progress import StageProgress, no_progress

__all__ = ["MODULATION_FILE", "CheckpointModulation", "modulation_weights", "write_modulation"]

MODULATION_FILE = "modulation.weights"


def modulation_weights(config: TransformerConfig, reader: TensorReader | None) -> tuple[Weight, ...]:
    """Every tensor that only the timestep reaches, in the checkpoint's own layout and names.

    A matrix is bfloat16 where ``reader`` has it so, and float32 elsewhere, as where a LoRA was added to it. Without a
    reader all are bfloat16, as published. Biases are float32, because smoothing adds 1 / s - 1 to them.
    """
    known = frozenset() if reader is None else frozenset(reader.names())

    def dtype(name: str) -> DType:
        return "float32" if reader is not None and name in known and reader.dtype(name) != "bfloat16" else "bfloat16"

    return tuple(
        weight
        for name, shape in linears(config.layers, config.width).items()
        for weight in (
            Weight(name=f"{name}.weight", subfolder="transformer", shape=shape, dtype=dtype(f"{name}.weight")),
            Weight(name=f"{name}.bias", subfolder="transformer", shape=shape[:1], dtype="float32"),
        )
    )


def write_modulation(
    config: TransformerConfig,
    readers: Mapping[Subfolder, TensorReader],
    folder: Path,
    *,
    tables: DType,
    progress: StageProgress = no_progress,
) -> ModulationRecord:
    """Stream the modulation weights into ``folder``; see ``modulation_weights`` for their dtypes.

    Args:
        config: dimensions of the transformer.
        readers: the checkpoint's tensors.
        folder: where to write MODULATION_FILE.
        tables: dtype in which the transformer reads the tables.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
        BuildError: the disk is full.
    """
    weights = modulation_weights(config, readers["transformer"])
    written = write_weights(weights, readers, folder / MODULATION_FILE, progress=progress)
    offsets = {entry.name: entry.offset for entry in written.entries}
    return ModulationRecord(
        file=FileRecord(path=MODULATION_FILE, bytes=written.bytes, sha256=written.sha256),
        tables=tables,
        tensors=tuple(
            ModulationTensor(
                name=w.name,
                dtype="bfloat16" if w.dtype == "bfloat16" else "float32",
                shape=w.shape,
                offset=offsets[w.name],
            )
            for w in weights
        ),
        layers=config.layers,
        width=config.width,
        zero_cond_t=config.zero_cond_t,
    )


class CheckpointModulation:
    """The modulation weights read from a checkpoint, rounded as ``write_modulation`` stores them."""

    def __init__(self, config: TransformerConfig, reader: TensorReader) -> None:
        self._reader = reader
        self._weights = {weight.name: weight for weight in modulation_weights(config, reader)}

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32.

        Raises:
            CheckpointError: the tensor is missing, of another shape or not finite.
        """
        return prepare(self._weights[name], self._reader.read(name)).astype(np.float32)
