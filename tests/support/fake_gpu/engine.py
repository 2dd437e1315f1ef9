"""ICudaEngine: an engine is a JSON file that names an ONNX graph."""

import weakref
from typing import Any

from tests.support.fake_gpu.config import RuntimeConfig
from tests.support.fake_gpu.context import Context, need
from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.types import DTYPES, DataType, Location, Mode, Strategy

Shape = tuple[int, ...]


class Engine:
    """ICudaEngine; its weights are in the GPU's memory until nothing holds it any more."""

    def __init__(self, runtime: Any, content: dict[str, Any]) -> None:
        self.runtime, self.gpu, self.content = runtime, runtime.gpu, content
        self.component: str = content["component"]
        self.inputs = {name: (dtype, tuple(dims)) for name, dtype, dims in content["inputs"]}
        self.outputs = {name: (dtype, tuple(dims)) for name, dtype, dims in content["outputs"]}
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(content["profiles"])
        self.streamable_weights_size = content.get("streamable", 0)
        self.weight_streaming_budget_v2 = self.streamable_weights_size
        self.gpu.hold(content["weights"])
        self.gpu.engines.append(weakref.ref(self))
        weakref.finalize(self, release, self.gpu, content["weights"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_location(self, name: str) -> Location:
        return Location.HOST if name in self.content.get("host", ()) else Location.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[self.tensors[name][0]]

    def get_tensor_shape(self, name: str) -> Shape:
        shape: Shape = self.tensors[name][1]
        return shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        fixed = [self.get_tensor_shape(name)] * 3
        return [tuple(shape) for shape in self.content["profiles"][profile_index].get(name, fixed)]

    def get_weight_streaming_automatic_budget(self) -> int:
        return int(self.streamable_weights_size // 2)

    @property
    def device_memory_size_v2(self) -> int:
        """What the largest shapes of any profile need."""
        profiles = range(self.num_optimization_profiles)
        return max(need({name: self.get_tensor_profile_shape(name, p)[2] for name in self.inputs}) for p in profiles)

    def create_execution_context(self, strategy: Any) -> "Context":
        if strategy is not Strategy.USER_MANAGED:
            raise Misuse("a context that allocates by itself: the arena is not shared")
        self.gpu.log.append(("context", self.component))
        return Context(self, None)


class RtxEngine(Engine):
    def create_runtime_config(self) -> "RuntimeConfig":
        return RuntimeConfig(self)

    def create_execution_context(self, runtime_config: Any) -> "Context":
        if runtime_config.strategy is not Strategy.USER_MANAGED:
            raise Misuse("a context that allocates by itself: the arena is not shared")
        self.gpu.log.append(("context", self.component))
        return Context(self, runtime_config)


def release(gpu: Device, size: int) -> None:
    gpu.in_use -= size
