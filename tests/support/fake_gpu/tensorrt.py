"""The modules of TensorRT and of TensorRT for RTX for a fake GPU."""

import functools
import json
from types import ModuleType
from typing import Any

from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.engine import Engine, RtxEngine
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.owned import Owned
from tests.support.fake_gpu.types import (
    CudaGraphStrategy,
    DataType,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ILogger,
    Location,
    Mode,
    Severity,
    Specialization,
    Strategy,
)


def tensorrt(gpu: Device, name: str, backend: str) -> ModuleType:
    """The module of TensorRT (``backend`` "tensorrt") or of TensorRT for RTX."""
    module = ModuleType(name)
    vars(module).update(
        __version__=gpu.version,
        ILogger=ILogger,
        DataType=DataType,
        TensorIOMode=Mode,
        TensorLocation=Location,
        ExecutionContextAllocationStrategy=Strategy,
        Runtime=functools.partial(Runtime, gpu, name),
    )
    if backend == "tensorrt-rtx":
        vars(module).update(
            CudaGraphStrategy=CudaGraphStrategy,
            DynamicShapesKernelSpecializationStrategy=Specialization,
            EngineValidity=EngineValidity,
            EngineInvalidityDiagnostics=EngineInvalidityDiagnostics,
            Runtime=functools.partial(RtxRuntime, gpu, name),
        )
    return module


class Runtime(Owned):
    """IRuntime of TensorRT."""

    def __init__(self, gpu: Device, module: str, logger: ILogger) -> None:
        if gpu.device is None:
            raise Misuse("a runtime is made before a GPU is chosen")
        self.gpu, self.module, self.logger = gpu, module, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine, or None, with the reason in the log."""
        content = self.parsed(serialized_engine)
        if content is None:
            return self.refuse("header.magicTag == kEXPECTED_MAGIC_TAG failed")
        for key, value in self.expected.items():
            if content[key] != value:
                return self.refuse(f"{key} is {content[key]}, expected {value}")
        return self.loaded(content)

    def loaded(self, content: dict[str, Any]) -> Any:
        """With its weights in the GPU's memory, but for those that are streamed: a budget allocates them."""
        resident = content["weights"] - content.get("streamable", 0)
        if self.gpu.in_use + resident > self.gpu.memory_bytes:
            return self.refuse("Requested amount of GPU memory could not be allocated")
        self.gpu.log.append(("load", content["component"]))
        engine = self.new_engine(content)
        engine.native.hold(resident)
        return engine

    def new_engine(self, content: dict[str, Any]) -> Engine:
        return Engine(self, content)

    @property
    def expected(self) -> dict[str, str]:
        return {"fake": self.module, "version": self.gpu.version, "capability": self.gpu.capability}

    def parsed(self, blob: Any) -> dict[str, Any] | None:
        if blob is None:
            raise TypeError("incompatible function arguments")
        try:
            content: dict[str, Any] = json.loads(bytes(blob))
        except ValueError:
            return None
        return content

    def refuse(self, text: str) -> None:
        self.gpu.refused.append(text)
        self.logger.log(Severity.ERROR, text)


class RtxRuntime(Runtime):
    """IRuntime of TensorRT for RTX."""

    def __init__(self, gpu: Device, module: str, logger: ILogger) -> None:
        super().__init__(gpu, module, logger)
        self.defer_weights_loading = False
        self.engine_header_size = 64

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        """The first ``engine_header_size`` bytes are enough for the real one; this one needs the whole file."""
        found = EngineInvalidityDiagnostics
        content = self.parsed(buffer)
        if content is None:
            return EngineValidity.INVALID, int(found.MALFORMED_ENGINE)
        problems = 0
        if content["version"] != self.gpu.version:
            problems |= found.VERSION_MISMATCH
        if content["capability"] != self.gpu.capability:
            problems |= found.UNSUPPORTED_CC
        if self.gpu.old_driver:
            problems |= found.OLD_CUDA_DRIVER
        return (EngineValidity.INVALID if problems else EngineValidity.VALID), int(problems)

    def loaded(self, content: dict[str, Any]) -> Any:
        if not self.defer_weights_loading:
            return super().loaded(content)
        self.gpu.log.append(("load", content["component"]))
        return RtxEngine(self, content, deferred=True)

    def new_engine(self, content: dict[str, Any]) -> Engine:
        return RtxEngine(self, content)
