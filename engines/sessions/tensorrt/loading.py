"""Load an engine: check that it can run here, map its file, and bring its weights to the GPU."""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BundleError, EngineError, EngineMismatchError, QieError, first_line
from qie.engines.machine import GIB
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Device
from qie.engines.sessions.tensorrt.contract import NUMPY_DTYPES
from qie.engines.sessions.tensorrt.messages import raising

__all__ = ["LoadedEngine"]

STREAMING_MARGIN = GIB
"""GPU memory that a budget for streamed weights leaves free, for contexts and kernels: an estimate."""

DIAGNOSES = {
    "OLD_CUDA_DRIVER": "the driver is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it; install the newer package that `qie doctor` names",
    "UNSUPPORTED_CC": "it is for another GPU; build for this one with a recipe of `qie recipes`",
    "CUDA_ERROR": "CUDA does not work here; see `qie doctor`",
    "VERSION_MISMATCH": "it was built by another version; build the bundle again with `qie build`",
    "MALFORMED_ENGINE": "the file is damaged; build the bundle again with `qie build`",
}
"""EngineInvalidityDiagnostics of TensorRT for RTX to what it means and how to fix it, the first cause first."""

ENGINES_FAULT = ("VERSION_MISMATCH", "MALFORMED_ENGINE")


class LoadedEngine:
    """An engine in the memory of a GPU.

    Attributes:
        engine: TensorRT's object; None once it is closed.
        streams: weights stay in host memory and are copied in every run, which is then synchronous and cannot be
            captured (NvInferRuntime.h, ``setWeightStreamingBudgetV2``).
    """

    def __init__(self, trt: Any, messages: Any, record: EngineRecord, path: Path, device: Device) -> None:
        """Load the engine in the file ``path``, which is mapped and not read into memory.

        Where engines take turns, weights are loaded apart from the rest, so that they can be unloaded alone.

        Raises:
            BundleError: the file is not an engine of the installed TensorRT.
            EngineMismatchError: the engine is not for this GPU or driver.
            EngineError: the GPU is out of memory.
        """
        self._trt, self._messages, self._record, self._path, self._device = trt, messages, record, path, device
        self._runtime: Any = None
        self.engine: Any = None
        self._content: mmap.mmap | None = _map(path)
        try:
            with raising(self.error):
                self._runtime = trt.Runtime(messages)
                deferred = self._load()
                self.streams = self._set_streaming_budget()
        except BaseException:
            self.close()
            raise
        self._deferred = deferred
        if not deferred:
            self._content.close()
            self._content = None

    def _load(self) -> bool:
        """Load the engine; whether its weights were loaded apart from it."""
        self._check_validity()
        deferred = self._device.options.unloads and hasattr(self._runtime, "defer_weights_loading")
        self.engine = self._deserialize(deferred=deferred)
        if deferred and (self.engine.streamable_weights_size or not self.engine.load_weights(self._content)):
            self.engine, deferred = None, False
            self.engine = self._deserialize(deferred=False)
        return deferred

    def load_weights(self) -> None:
        """Bring back weights that were unloaded; contexts stay valid.

        Raises:
            EngineError: the GPU is out of memory, or TensorRT failed.
        """
        if not self._deferred or self.engine.weights_loaded:
            return
        assert self._content is not None
        _read_ahead(self._content)
        with raising(self.error):
            loaded = self.engine.load_weights(self._content)
        if not loaded:
            raise self.error(self._messages.take())

    def unload_weights(self) -> bool:
        """Give the memory of the weights back; False where TensorRT cannot. No run may be in flight."""
        with raising(self.error):
            return self._deferred and bool(self.engine.unload_weights())

    def close(self) -> None:
        """Release engine and file; contexts and configs of the engine must be gone."""
        self.engine = None
        self._runtime = None
        if self._content is not None:
            self._content.close()
            self._content = None

    def _check_validity(self) -> None:
        """Ask TensorRT for RTX whether the engine can run here; it says why not, and loading does not."""
        trt, runtime = self._trt, self._runtime
        if not hasattr(runtime, "get_engine_validity"):
            return
        validity, diagnostics = runtime.get_engine_validity(self._content)
        if validity != trt.EngineValidity.INVALID:
            return
        found = trt.EngineInvalidityDiagnostics
        for name, meaning in DIAGNOSES.items():
            if int(diagnostics) & int(getattr(found, name)):
                kind = BundleError if name in ENGINES_FAULT else EngineMismatchError
                raise kind(f"{self._name} cannot load {self._path} ({name}): {meaning}")

    def _deserialize(self, *, deferred: bool) -> Any:
        runtime = self._runtime
        self._messages.errors.clear()
        if deferred:
            runtime.defer_weights_loading = True
        elif hasattr(runtime, "defer_weights_loading"):
            runtime.defer_weights_loading = False
        engine = runtime.deserialize_cuda_engine(self._content)
        if engine is None:
            raise self.error(self._messages.take())
        return engine

    def error(self, errors: str) -> QieError:
        """The error of an engine that does not load, for what TensorRT logged or raised."""
        if "memory" in errors.lower():
            free, total = cuda.memory()
            size = next(file.bytes for file in self._record.files if file.path == self._record.path)
            fix = "" if self._device.options.unloads else 'with residency = "sequential", or '
            return EngineError(
                f"{self._record.component} has {size:,} bytes, the GPU {free:,} of {total:,} bytes free ({errors}); "
                f"build {fix}for a larger GPU"
            )
        return BundleError(
            f"{self._name} cannot load {self._path} ({errors or 'no reason given'}); build the bundle again with "
            "`qie build`, and see `qie doctor` on GPU and driver"
        )

    def _set_streaming_budget(self) -> bool:
        """Keep as many weights on the GPU as have room beside everything else; whether some are streamed.

        The budget is computed here because the automatic one knows nothing of what is allocated later, and its Python
        binding truncates it to 32 bits (pyCore.cpp). The setter drops the result of the call, so it is read back.
        """
        engine, device = self.engine, self._device
        streamable = int(engine.streamable_weights_size)
        if streamable <= 0:
            return False
        free, _ = cuda.memory()
        for _ in range(2):  # streaming takes memory for runs itself (weight_streaming_scratch_memory_size)
            device.expect(int(engine.device_memory_size_v2))
            taken = device.arena_to_come + device.weights_to_come + _largest_io(self._record) + STREAMING_MARGIN
            budget = min(streamable, max(free - taken, 0))
            engine.weight_streaming_budget_v2 = budget
        actual = int(engine.weight_streaming_budget_v2)
        if actual > budget:
            raise EngineError(
                f"{self._name} keeps {actual:,} bytes of {self._record.component} on the GPU, which has room for "
                f"{budget:,} ({self._messages.take() or 'no reason given'}); build for a larger GPU"
            )
        return actual < streamable

    @property
    def _name(self) -> str:
        trt = self._trt
        return f"{trt.__name__} {trt.__version__}"


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as problem:  # absent, empty
        raise BundleError(
            f"{path} cannot be read ({first_line(problem)}); build the bundle again with `qie build`"
        ) from problem
    _read_ahead(content)
    return content


def _read_ahead(content: mmap.mmap) -> None:
    """Tell the system that the file is read from its start to its end, and soon."""
    for advice in ("MADV_SEQUENTIAL", "MADV_WILLNEED"):
        if hasattr(mmap, advice):
            content.madvise(getattr(mmap, advice))


def _largest_io(record: EngineRecord) -> int:
    """Bytes of the inputs with free dims in the largest run, twice: once for the outputs, which are of their size."""
    largest = {profile.input: profile.max for profile in record.profiles}
    return 2 * sum(
        math.prod(largest[spec.name]) * np.dtype(NUMPY_DTYPES[spec.dtype]).itemsize
        for spec in record.inputs
        if spec.name in largest
    )
