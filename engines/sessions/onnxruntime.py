"""Engines that onnxruntime executes: ONNX graphs with their weights beside them, on the processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qie.engines.errors import BundleError, EditError
from qie.engines.manifest import EngineRecord
from qie.engines.sessions.session import Tensor

__all__ = ["OnnxRuntimeSession", "version"]

DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "int64": np.int64, "uint8": np.uint8}


def version() -> str:
    """Version of the onnxruntime that executes."""
    return str(ort.__version__)


class OnnxRuntimeSession:
    """One ONNX graph loaded by onnxruntime.

    Inputs and outputs are bound by address (IO binding): a run reads and writes the caller's memory and copies
    nothing. Weights are mapped from the bundle, not read into it.
    """

    def __init__(self, folder: Path, engine: EngineRecord, *, threads: int = 0) -> None:
        """Load ``engine`` of the bundle ``folder``; ``threads`` 0 means one a core.

        Raises:
            BundleError: onnxruntime cannot load the graph.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(str(folder / engine.path), options, providers=["CPUExecutionProvider"])
        except Exception as problem:
            raise BundleError(
                f"onnxruntime {version()} cannot load {folder / engine.path} ({_first_line(problem)}); "
                "build the bundle again with `qie build`"
            ) from problem
        self._engine = engine
        self._outputs = {spec.name: spec for spec in engine.outputs}

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor over the memory of ``array``: nothing is copied where it is contiguous."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def empty(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """A tensor for the output ``name`` where ``sizes`` gives the free dims."""
        spec = self._outputs[name]
        return ort.OrtValue.ortvalue_from_shape_and_type(list(spec.shape(sizes)), DTYPES[spec.dtype], "cpu", 0)

    def download(self, tensor: Tensor) -> NDArray[np.generic]:
        """The content of ``tensor``."""
        array: NDArray[np.generic] = tensor.numpy()
        return array

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute ``outputs`` from ``inputs`` in place.

        Raises:
            EditError: onnxruntime refused the tensors or ran out of memory.
        """
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as problem:
            raise EditError(
                f"onnxruntime failed in {self._engine.component} ({_first_line(problem)}); "
                "try a smaller --size or fewer images"
            ) from problem


def _first_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
