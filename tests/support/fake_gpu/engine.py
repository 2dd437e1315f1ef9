"""ICudaEngine: an engine is a JSON file that names an ONNX graph.

Sources of what it answers: pyCore.cpp (``get_weight_streaming_automatic_budget`` is bound as an int32, the setter of
``weight_streaming_budget_v2`` drops the result), NvInferRuntime.h (``setWeightStreamingBudgetV2``), the docstrings of
tensorrt_rtx 1.7.1 (``load_weights``, ``unload_weights``), engines compiled by it (a dim that a profile fixes is that
number and not -1).
"""

import json
import weakref
from typing import Any

from tests.support.fake_gpu.config import RtxRuntimeConfig, RuntimeConfig
from tests.support.fake_gpu.context import Context, need
from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.owned import Owned
from tests.support.fake_gpu.types import DTYPES, DataType, Dims, Location, Mode, Strategy

Shape = tuple[int, ...]


class NativeEngine:
    """The C++ object behind an engine, and the memory of its weights."""

    def __init__(self, gpu: Device) -> None:
        self.gpu, self.configs, self.held = gpu, 0, 0

    def hold(self, size: int) -> None:
        self.gpu.hold(size - self.held)
        self.held = size

    def destroy(self) -> None:
        self.hold(0)
        if self.configs:
            self.gpu.crash("an engine is destroyed before its runtime config")


class Engine(Owned):
    """ICudaEngine of TensorRT; its weights are in the GPU's memory until nothing holds it any more."""

    def __init__(self, runtime: Any, content: dict[str, Any]) -> None:
        self.runtime, self.gpu, self.content = runtime, runtime.gpu, content
        self.component: str = content["component"]
        self.inputs = {name: (dtype, tuple(dims)) for name, dtype, dims in content["inputs"]}
        self.outputs = {name: (dtype, tuple(dims)) for name, dtype, dims in content["outputs"]}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(content["profiles"])
        self.streamable_weights_size = content.get("streamable", 0)
        self.native = NativeEngine(self.gpu)
        self._budget = self.streamable_weights_size
        self.gpu.engines.append(weakref.ref(self))

    def destroy(self) -> None:
        self.native.destroy()

    @property
    def alive_contexts(self) -> int:
        return sum(1 for c in self.gpu.contexts if (context := c()) is not None and context.engine is self)

    @property
    def ready(self) -> bool:
        return True

    # Tensors

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if name in self.content.get("host", ()) else Location.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[self.tensors[name][0]]

    def get_tensor_shape(self, name: str) -> Dims:
        """-1 only for a dim that differs within a profile or between profiles."""
        if name not in self.tensors:
            return Dims()
        dims = self.tensors[name][1]
        if name in self.outputs:
            return Dims(dims)
        shapes = [tuple(s) for p in self.content["profiles"] if name in p for s in p[name]]
        fixed = [len({shape[i] for shape in shapes}) == 1 if shapes else True for i in range(len(dims))]
        return Dims(shapes[0][i] if dim == -1 and fixed[i] and shapes else dim for i, dim in enumerate(dims))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        fixed = [self.tensors[name][1]] * 3
        return [Dims(shape) for shape in self.content["profiles"][profile_index].get(name, fixed)]

    # Memory

    @property
    def weight_streaming_budget_v2(self) -> int:
        return int(self._budget)

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """A refusal is logged and not raised. Memory of the weights is allocated here."""
        if not self.streamable_weights_size or budget < 0 or self.alive_contexts:
            self.runtime.refuse("the weight streaming budget cannot be set")
            return
        budget = min(budget, self.streamable_weights_size)
        fixed = self.content["weights"] - self.streamable_weights_size
        if self.gpu.in_use - self.native.held + fixed + budget > self.gpu.memory_bytes:
            self.runtime.refuse("Requested amount of GPU memory could not be allocated")
            return
        self._budget = budget
        self.native.hold(fixed + budget)

    def get_weight_streaming_automatic_budget(self) -> int:
        """An int32: a budget above 2 GiB comes out truncated."""
        low = min(self.streamable_weights_size, self.gpu.memory_bytes - self.gpu.in_use) & 0xFFFFFFFF
        return low - (1 << 32) if low >> 31 else low

    @property
    def streaming(self) -> bool:
        return self.weight_streaming_budget_v2 < self.streamable_weights_size

    @property
    def device_memory_size_v2(self) -> int:
        """What the largest shapes of any profile need."""
        profiles = range(self.num_optimization_profiles)
        return max(
            need({name: tuple(self.get_tensor_profile_shape(name, p)[2]) for name in self.inputs}) for p in profiles
        )

    # Contexts

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self)

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> "Context | None":
        """``strategy`` is a strategy or a runtime config; None where memory is short."""
        config = strategy if isinstance(strategy, RuntimeConfig) else None
        if config is None and not isinstance(strategy, Strategy):
            raise TypeError("create_execution_context(): incompatible function arguments")
        managed = config.get_execution_context_allocation_strategy() if config else strategy
        self.gpu.log.append(("context", self.component))
        return Context(self, config, managed=managed is Strategy.USER_MANAGED)


class RtxEngine(Engine):
    """ICudaEngine of TensorRT for RTX, whose weights may come later."""

    def __init__(self, runtime: Any, content: dict[str, Any], *, deferred: bool = False) -> None:
        super().__init__(runtime, content)
        self._deferred, self.weights_loaded = deferred, not deferred

    @property
    def ready(self) -> bool:
        return self.weights_loaded

    def create_runtime_config(self) -> RuntimeConfig:
        return RtxRuntimeConfig(self)

    def load_weights(self, blob: Any) -> bool:
        try:
            same = json.loads(bytes(blob)) == self.content
        except ValueError:
            same = False
        if not self._deferred or self.weights_loaded or not same:
            return False
        if self.gpu.in_use + self.content["weights"] > self.gpu.memory_bytes:
            self.runtime.refuse("Requested amount of GPU memory could not be allocated")
            return False
        self.native.hold(self.content["weights"])
        self.gpu.log.append(("load weights", self.component))
        self.weights_loaded = True
        return True

    def unload_weights(self) -> bool:
        if not self._deferred or not self.weights_loaded:
            return False
        if any((c := each()) is not None and c.engine is self and c.in_flight[0] for each in self.gpu.contexts):
            self.gpu.misuse("weights are unloaded while work is in flight")
        self.native.hold(0)
        self.weights_loaded = False
        self.gpu.log.append(("unload weights", self.component))
        return True
