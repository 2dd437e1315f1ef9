"""The weights of one block in memory, as its graph reads them.

They are read and laid out in the checkpoint's dtype, half the size of float32, and widened when the block runs, so that
the next block's can be read meanwhile.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
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
        fed: what is float32 in the graph; bfloat16 until it is widened.
        tables: of which rows are taken, in the checkpoint's dtype.
        stored: other dtypes, as initializers.
    """

    fed: dict[str, NDArray[Any]]
    tables: dict[str, NDArray[Any]]
    stored: tuple[onnx.TensorProto, ...]

    def widen(self) -> None:
        """Make ``fed`` float32, one weight at a time."""
        for name, tensor in self.fed.items():
            if tensor.dtype != np.float32:
                self.fed[name] = tensor.astype(np.float32)

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


def read_weights(weights: Sequence[Weight], tables: Collection[str], readers: Readers) -> BlockWeights:
    """Read the weights of a block; of those in ``tables`` only rows are needed.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or not finite.
    """
    fed: dict[str, NDArray[Any]] = {}
    stored = []
    lookup = {weight.name: weight for weight in weights if weight.name in tables and not weight.layout}
    assert len(lookup) == len(tables)
    for weight in weights:
        if weight.name in lookup:
            continue
        raw = readers[weight.subfolder].read(weight.source)
        if weight.dtype == "float32" and weight.quantizer is None:
            narrow = raw.dtype.name == "bfloat16"
            fed[weight.name] = prepare(replace(weight, dtype="bfloat16") if narrow else weight, raw)
        else:
            stored.append(numpy_helper.from_array(prepare(weight, raw), weight.name))
        del raw
    return BlockWeights(
        fed=fed,
        tables={name: readers[weight.subfolder].read(weight.source) for name, weight in lookup.items()},
        stored=tuple(stored),
    )
