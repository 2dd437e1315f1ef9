"""Tensors in the memory of the host, for sessions whose engine copies what it reads and writes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import EngineRecord, GraphRecord, TensorSpec

__all__ = ["HostTensors"]

_NUMPY_DTYPES = {"float32": "float32", "bfloat16": "uint16", "int64": "int64", "uint8": "uint8"}
"""NumPy's names of the manifest's dtypes: it has no bfloat16, so that is held as its bits."""


class HostTensors:
    """The part of ``Session`` that is about tensors: they are arrays."""

    rebinds = True  # nothing is bound

    def __init__(self, record: EngineRecord | GraphRecord) -> None:
        self._inputs_by_name = {spec.name: spec for spec in record.inputs}
        self._outputs_by_name = {spec.name: spec for spec in record.outputs}
        self._component = record.component

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """``array`` itself."""
        return array

    def empty(self, name: str, sizes: Mapping[str, int]) -> NDArray[Any]:
        """An array for the output ``name`` where ``sizes`` gives the free dims."""
        spec = self._outputs_by_name[name]
        return np.empty(spec.shape(sizes), _NUMPY_DTYPES[spec.dtype])

    def copy(self, source: NDArray[Any], target: NDArray[Any]) -> None:
        """Copy between arrays."""
        np.copyto(target, source)

    def download(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """``tensor`` itself."""
        return tensor

    def unload(self) -> bool:
        """False: the weights leave with the engine alone."""
        return False

    def check_tensors(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Assert that the caller passed the inputs and outputs of the manifest."""
        for tensors, specs in ((inputs, self._inputs_by_name), (outputs, self._outputs_by_name)):
            names = tensors.keys() ^ specs.keys()
            assert not names, f"{self._component}: {', '.join(sorted(names))} missing or unknown"
            for name, spec in specs.items():
                passed = f"{tensors[name].dtype.name} {list(tensors[name].shape)}"
                expected = f"{spec.dtype} {list(spec.dims)}"
                assert _fits(tensors[name], spec), f"{self._component}: {name} is {passed}, expected {expected}"


def _fits(array: NDArray[Any], spec: TensorSpec) -> bool:
    dims = array.shape
    same = len(dims) == len(spec.dims) and all(
        isinstance(d, str) or d == n for d, n in zip(spec.dims, dims, strict=True)
    )
    return same and array.dtype == np.dtype(_NUMPY_DTYPES[spec.dtype])
