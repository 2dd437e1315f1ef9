"""The modules of TensorRT and of TensorRT for RTX for a fake GPU."""

import functools
import json
from types import ModuleType
from typing import Any

from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.engine import Engine, RtxEngine
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.types import (
    CudaGraphStrategy,
    DataType,
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
            CudaGraphStrategy=CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy=Specialization
        )
    return module


class Runtime:
    def __init__(self, gpu: Device, module: str, logger: ILogger) -> None:
        if gpu.device is None:
            raise Misuse("a runtime is made before a GPU is chosen")
        self.gpu, self.module, self.logger = gpu, module, logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        try:
            content = json.loads(bytes(serialized_engine))
        except ValueError:
            return self.refuse("header.magicTag == kEXPECTED_MAGIC_TAG failed")
        expected = {"fake": self.module, "version": self.gpu.version, "capability": self.gpu.capability}
        for key, value in expected.items():
            if content[key] != value:
                return self.refuse(f"{key} is {content[key]}, expected {value}")
        if self.gpu.in_use + content["weights"] > self.gpu.memory_bytes:
            return self.refuse("Requested amount of GPU memory could not be allocated")
        self.gpu.log.append(("load", content["component"]))
        return (RtxEngine if self.module == "tensorrt_rtx" else Engine)(self, content)

    def refuse(self, text: str) -> None:
        self.gpu.refused.append(text)
        self.logger.log(Severity.ERROR, text)
