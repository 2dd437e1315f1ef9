"""The modulation weights of a bundle as a reader of tensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import ModulationRecord

__all__ = ["StoredModulation"]


class StoredModulation:
    """A ``TensorReader`` of the file that a bundle has, in which LoRAs and smoothing are applied."""

    def __init__(self, folder: Path, record: ModulationRecord) -> None:
        assert record.file is not None, "a bundle without modulation weights"
        self._mapped = np.memmap(folder / record.file.path, dtype=np.uint8, mode="r")
        self._tensors = {tensor.name: tensor for tensor in record.tensors}

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """The tensor's dtype."""
        return self._tensors[name].dtype

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """These names in the order of the file, each once."""
        wanted = frozenset(names)
        return tuple(name for name in self._tensors if name in wanted)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor, a read-only view of the mapped file."""
        tensor = self._tensors[name]
        dtype = np.dtype(ml_dtypes.bfloat16 if tensor.dtype == "bfloat16" else np.float32)
        length = int(np.prod(tensor.shape)) * dtype.itemsize
        return self._mapped[tensor.offset : tensor.offset + length].view(dtype).reshape(tensor.shape)
