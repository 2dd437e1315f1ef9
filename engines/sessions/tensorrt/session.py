"""Engines that TensorRT or TensorRT for RTX executes, on a GPU.

Both modules have one API; where they differ, the code checks whether a name exists. Activations are in the device's
arena, whose size TensorRT reports for the current shapes.
"""

import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import QieError
from qie.engines.sessions.device import Device, DeviceTensor
from qie.engines.sessions.tensorrt.contexts import Contexts
from qie.engines.sessions.tensorrt.contract import NUMPY_DTYPES, check_contract, matches, shape_text
from qie.engines.sessions.tensorrt.loading import LoadedEngine
from qie.engines.sessions.tensorrt.messages import messages_of, raising

__all__ = ["TensorRtSession"]


class TensorRtSession:
    """One engine in the memory of a GPU. It is closed when it is dropped, and at exit.

    Attributes:
        contract: inputs and outputs as TensorRT has them, by name, such as "input float32 -1x-1x64".
    """

    rebinds = False  # a CUDA graph holds addresses

    def __init__(self, folder: Path, record: EngineRecord, device: Device) -> None:
        """Load the engine of ``record`` in the bundle ``folder``; its file is mapped, not read into memory.

        Raises:
            BundleError: the file is not an engine of the installed TensorRT, or not the one in the manifest.
            EngineMismatchError: the engine is not for this GPU or driver.
            EngineError: the GPU is out of memory.
        """
        trt = import_module(BACKENDS[record.backend].modules[0])
        messages = messages_of(trt)
        path = folder / record.path
        self._record, self._device = record, device
        self._specs = {spec.name: spec for spec in (*record.inputs, *record.outputs)}
        self._outputs = {spec.name: spec for spec in record.outputs}
        device.use()
        with ExitStack() as stack:
            self._loaded = LoadedEngine(trt, messages, record, path, device)
            stack.callback(self._loaded.close)
            engine = self._loaded.engine
            with raising(self._loaded.error):
                self.contract = check_contract(trt, engine, record, path)
                device.expect(int(engine.device_memory_size_v2))
            self._contexts = Contexts(trt, messages, engine, record, device, streams=self._loaded.streams)
            stack.pop_all()
        self._closing = weakref.finalize(self, _close_quietly, device, self._contexts, self._loaded)

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """A tensor on the GPU with the content of ``array``."""
        return self._device.upload(array)

    def empty(self, name: str, sizes: Mapping[str, int]) -> DeviceTensor:
        """A tensor on the GPU for the output ``name`` where ``sizes`` gives the free dims."""
        spec = self._outputs[name]
        return self._device.empty(spec.shape(sizes), NUMPY_DTYPES[spec.dtype])

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Enqueue a copy on the GPU."""
        self._device.copy(source, target)

    def download(self, tensor: DeviceTensor) -> NDArray[np.generic]:
        """The content of ``tensor``, once all work so far is done."""
        return self._device.download(tensor)

    def shape(self, tensor: DeviceTensor) -> tuple[int, ...]:
        """The shape of ``tensor``."""
        return tensor.shape

    def run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        """Enqueue a run; a failure on the GPU is raised by ``download``. Unloaded weights are loaded first.

        Raises:
            RequestError: a shape is outside the engine's profiles.
            EngineError: TensorRT failed, or the GPU is out of memory.
        """
        tensors = {**inputs, **outputs}
        self._check_tensors(tensors)
        self._device.use()
        self._loaded.load_weights()
        self._contexts.run(tuple((name, tensors[name].address, tensors[name].shape) for name in self._specs))

    def unload(self) -> bool:
        """Give the memory of the weights back once the GPU is done, and keep contexts and kernels."""
        self._device.use()
        self._device.synchronize()
        self._contexts.drop_graphs()  # they read the weights where these are now
        return self._loaded.unload_weights()

    def close(self) -> None:
        """Release engine, contexts and CUDA graphs once the GPU is done. Closing twice is allowed.

        Raises:
            EngineError: some of the work failed; everything is released all the same.
        """
        if self._closing.detach() is not None:
            _close(self._device, self._contexts, self._loaded)

    @property
    def activation_bytes(self) -> int:
        """Memory that a run of the largest shapes needs beside the weights."""
        return int(self._loaded.engine.device_memory_size_v2)

    @property
    def captured(self) -> bool:
        """Whether runs are captured as CUDA graphs, as far as TensorRT tells: it warns where it does not capture."""
        return self._contexts.captured

    @property
    def cuda_graphs(self) -> int:
        """Captured CUDA graphs; 0 where TensorRT captures them itself."""
        return self._contexts.cuda_graphs

    def _check_tensors(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """Assert that the caller passed the inputs and outputs of the manifest."""
        names = tensors.keys() ^ self._specs.keys()
        assert not names, f"{self._record.component}: {', '.join(sorted(names))} missing or unknown"
        for name, spec in self._specs.items():
            tensor = tensors[name]
            fits = tensor.dtype == NUMPY_DTYPES[spec.dtype] and matches(tensor.shape, spec)
            passed = f"{tensor.dtype.name} {shape_text(tensor.shape)}"
            assert fits, f"{self._record.component}: {name} is {passed}, expected {spec.dtype} {shape_text(spec.dims)}"


def _close(device: Device, contexts: Contexts, loaded: LoadedEngine) -> None:
    with ExitStack() as stack:  # last in, first out; no failure skips what is left
        stack.callback(loaded.close)
        stack.callback(contexts.close)
        stack.callback(device.synchronize)
        device.use()


def _close_quietly(device: Device, contexts: Contexts, loaded: LoadedEngine) -> None:
    """Close what was left open; there is nobody left to handle a failure of the GPU."""
    with suppress(QieError):
        _close(device, contexts, loaded)
