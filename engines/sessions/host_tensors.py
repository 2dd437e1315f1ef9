"""Tensors in the memory of the host, for sessions whose engine copies what it reads and writes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.sessions.tensorrt.contract import NUMPY_DTYPES, matches

__all__ = ["HostTensors"]


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
        return np.empty(spec.shape(sizes), NUMPY_DTYPES[spec.dtype])

    def copy(self, source: NDArray[Any], target: NDArray[Any]) -> None:
        """Copy between arrays."""
        np.copyto(target, source)

    def download(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """``tensor`` itself."""
        return tensor

    def shape(self, tensor: NDArray[Any]) -> tuple[int, ...]:
        """The shape of ``tensor``."""
        return tensor.shape

    def unload(self) -> bool:
        """False: the weights leave with the engine alone."""
        return False

    def check_tensors(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        """Assert that the caller passed the inputs and outputs of the manifest."""
        for tensors, specs in ((inputs, self._inputs_by_name), (outputs, self._outputs_by_name)):
            names = tensors.keys() ^ specs.keys()
            assert not names, f"{self._component}: {', '.join(sorted(names))} missing or unknown"
            for name, spec in specs.items():
                fits = tensors[name].dtype == NUMPY_DTYPES[spec.dtype] and matches(tensors[name].shape, spec)
                passed = f"{tensors[name].dtype.name} {list(tensors[name].shape)}"
                expected = f"{spec.dtype} {list(spec.dims)}"
                assert fits, f"{self._component}: {name} is {passed}, expected {expected}"
