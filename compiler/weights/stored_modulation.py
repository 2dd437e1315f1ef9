"""The modulation weights of a bundle as a reader of tensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import ModulationRecord, ModulationTensor
from qie.engines.errors import BundleError, CheckpointError
from qie.engines.inputs.modulation import BundleModulation

__all__ = ["StoredModulation"]


class StoredModulation:
    """A ``TensorReader`` of the file that a bundle has, in which LoRAs and smoothing are applied."""

    def __init__(self, folder: Path, record: ModulationRecord) -> None:
        """Open the file of ``record`` in the bundle ``folder``.

        Raises:
            OSError: it is missing or cannot be read.
        """
        self._weights = BundleModulation(folder, record)
        self._tensors = {tensor.name: tensor for tensor in record.tensors}

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._known(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's dtype."""
        return self._known(name).dtype

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """These names in the order of the file, each once."""
        wanted = frozenset(names)
        return tuple(name for name in self._tensors if name in wanted)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor.

        Raises:
            CheckpointError: there is no such tensor, or the file cannot be read.
        """
        dtype = ml_dtypes.bfloat16 if self._known(name).dtype == "bfloat16" else np.float32
        try:
            return self._weights.stored(name).view(dtype)
        except BundleError as problem:
            raise CheckpointError(str(problem)) from problem

    def _known(self, name: str) -> ModulationTensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"the modulation weights have no tensor {name!r}; build the bundle again with `qie build`"
            )
        return self._tensors[name]
