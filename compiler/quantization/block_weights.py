"""The weights of one block in memory: what its graph reads is converted as soon as it was read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.prepare import prepare
from qie.compiler.weights.weight import Weight
from qie.engines.errors import CheckpointError

__all__ = ["BlockWeights", "Readers", "read_weights"]

Readers = Mapping[Subfolder, TensorReader]
"""The tensors of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockWeights:
    """Weights by name.

    Attributes:
        fed: what is float32 in the graph.
        tables: of which rows are taken, in the checkpoint's dtype.
        others: what else was asked for, as the checkpoint has it.
        stored: other dtypes, as initializers.
    """

    fed: dict[str, NDArray[Any]]
    tables: dict[str, NDArray[Any]]
    others: dict[str, NDArray[Any]]
    stored: tuple[onnx.TensorProto, ...]

    @property
    def fed_bytes(self) -> int:
        """Size of ``fed``."""
        return sum(tensor.nbytes for tensor in self.fed.values())

    def rows_of(self, name: str, numbers: NDArray[Any]) -> NDArray[np.float32]:
        """The rows ``numbers`` [...] of a table [rows, width], float32 [..., width].

        Raises:
            CheckpointError: one has an element that is not finite.
        """
        rows = np.asarray(self.tables[name][numbers], np.float32)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"the tensor {name!r} has infinite or NaN elements, expected finite ones; download the checkpoint again"
            )
        return rows


def read_weights(
    weights: Sequence[Weight], tables: Collection[str], others: Collection[str], readers: Readers
) -> BlockWeights:
    """Read the weights of a block in the order of the files.

    Args:
        weights: of one subfolder.
        tables: names of those of which only rows are needed.
        others: more tensors of the same subfolder.
        readers: the checkpoint's tensors.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or not finite.
    """
    assert len({weight.subfolder for weight in weights}) <= 1, "weights of several subfolders"
    if not weights:
        return BlockWeights(fed={}, tables={}, others={}, stored=())
    reader = readers[weights[0].subfolder]
    of_source: dict[str, list[Weight]] = {}
    for weight in weights:
        of_source.setdefault(weight.source, []).append(weight)
    assert all(not weight.layout for weight in weights if weight.name in tables)
    fed: dict[str, NDArray[Any]] = {}
    rows: dict[str, NDArray[Any]] = {}
    raws: dict[str, NDArray[Any]] = {}
    stored: dict[str, onnx.TensorProto] = {}
    for name in reader.order({*of_source, *others}):
        raw = reader.read(name)
        if name in others:
            raws[name] = raw
        for weight in of_source.get(name, ()):
            if weight.name in tables:
                rows[weight.name] = raw
            elif weight.dtype == "float32" and weight.quantizer is None:
                fed[weight.name] = prepare(weight, raw)
            else:
                stored[weight.name] = numpy_helper.from_array(prepare(weight, raw), weight.name)
        del raw
    return BlockWeights(
        fed=fed,
        tables=rows,
        others=raws,
        stored=tuple(stored[weight.name] for weight in weights if weight.name in stored),
    )
