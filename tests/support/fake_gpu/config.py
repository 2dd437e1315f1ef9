"""IRuntimeConfig and IRuntimeCache of TensorRT for RTX, and IRuntimeConfig of TensorRT.

Rules of a lifetime, for which the library crashes:

- The config does not keep its cache alive, and contexts use it until they are destroyed: "The runtime cache must stay
  referenced from Python: dropping it after set_runtime_cache segfaults" (NVIDIA's cookbook for TensorRT for RTX);
  onnxruntime's provider gives the cache to the deleter of its contexts for that reason.
- ``create_runtime_config`` has no ``keep_alive`` (pyCore.cpp), so a config must be destroyed before its engine.
"""

import json
from typing import Any

from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.owned import Owned
from tests.support.fake_gpu.types import CudaGraphStrategy, Specialization, Strategy


class RuntimeConfig(Owned):
    """IRuntimeConfig of TensorRT, which has the allocation strategy alone (pyCore.cpp, IRuntimeConfig)."""

    def __init__(self, engine: Any) -> None:
        self._gpu, self._native = engine.gpu, engine.native
        self._native.configs += 1
        self._strategy = Strategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Strategy = Strategy.STATIC) -> None:
        self._strategy = Strategy(strategy)

    def get_execution_context_allocation_strategy(self) -> Strategy:
        return self._strategy

    def destroy(self) -> None:
        self._native.configs -= 1


class RtxRuntimeConfig(RuntimeConfig):
    """IRuntimeConfig of TensorRT for RTX."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self.native_cache: NativeCache | None = None

    def create_runtime_cache(self) -> "RuntimeCache":
        return RuntimeCache(self._gpu)

    def set_runtime_cache(self, cache: "RuntimeCache") -> bool:
        self.native_cache = cache.native
        return True


class NativeCache:
    """The C++ object behind a RuntimeCache: contexts point to it and do not own it."""

    def __init__(self) -> None:
        self.destroyed = False
        self.contexts = 0
        self.shapes: list[Any] = []


class RuntimeCache(Owned):
    """IRuntimeCache: the shapes that kernels were compiled for."""

    def __init__(self, gpu: Device) -> None:
        self._gpu = gpu
        self.native = NativeCache()

    @property
    def shapes(self) -> list[Any]:
        return self.native.shapes

    @property
    def _environment(self) -> list[str]:
        return [self._gpu.driver, self._gpu.version, self._gpu.capability]

    def serialize(self) -> Any:
        """None without a current CUDA context ("no active CUDA context", strings of the library)."""
        if self._gpu.device is None or self._gpu.fingerprintless:
            return None
        self._gpu.log.append(("serialize cache", None))
        return json.dumps([self._environment, self.native.shapes]).encode()

    def deserialize(self, blob: Any) -> bool:
        """False for a damaged blob, or one of another environment (its docstring has the list)."""
        if blob is None:
            raise TypeError("deserialize(): incompatible function arguments")
        try:
            environment, shapes = json.loads(bytes(blob))
        except ValueError:
            return False
        if environment != self._environment:
            return False
        self.native.shapes[:] = shapes
        return True

    def destroy(self) -> None:
        self.native.destroyed = True
        if self.native.contexts:
            self._gpu.crash("a runtime cache is destroyed before the contexts that were made with it")
