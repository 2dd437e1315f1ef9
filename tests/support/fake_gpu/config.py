"""IRuntimeConfig and IRuntimeCache of TensorRT for RTX."""

import json
from typing import Any

from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.types import CudaGraphStrategy, Specialization, Strategy


class RuntimeConfig:
    """IRuntimeConfig of TensorRT for RTX."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.strategy = Strategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "RuntimeCache":
        return RuntimeCache(self.engine.gpu)

    def set_runtime_cache(self, cache: "RuntimeCache") -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """IRuntimeCache: the shapes that kernels were compiled for."""

    def __init__(self, gpu: Device) -> None:
        self.environment = [gpu.driver, gpu.version, gpu.capability]
        self.shapes: list[Any] = []

    def serialize(self) -> bytes:
        return json.dumps([self.environment, self.shapes]).encode()

    def deserialize(self, blob: Any) -> bool:
        try:
            environment, shapes = json.loads(bytes(blob))
        except ValueError:
            return False
        if environment != self.environment:
            return False
        self.shapes = shapes
        return True
