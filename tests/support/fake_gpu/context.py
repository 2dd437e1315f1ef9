"""IExecutionContext, and what a run of an engine computes: onnxruntime executes its graph."""

import functools
import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.inputs.prompt import PREFIX_TOKENS
from tests.support.fake_gpu.config import RuntimeConfig
from tests.support.fake_gpu.device import ALIGNMENT, GARBAGE
from tests.support.fake_gpu.handles import Misuse, Stream
from tests.support.fake_gpu.types import CudaGraphStrategy, Specialization

Shape = tuple[int, ...]


def need(shapes: Mapping[str, Any]) -> int:
    """Bytes of activations: invented, but larger for larger shapes, and never a whole multiple of anything."""
    return 1000 + 8 * sum(math.prod(shape) for shape in shapes.values())


class Context:
    """IExecutionContext with memory of the application's."""

    def __init__(self, engine: Any, config: RuntimeConfig | None) -> None:
        self.engine, self.gpu, self.config = engine, engine.gpu, config
        self.gpu.contexts.append(weakref.ref(self))
        self.profile: int | None = None if engine.num_optimization_profiles > 1 else 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.arena: tuple[int, int] | None = None
        self.changes = 0
        self.earlier_runs: list[Any] = []

    def refuse(self, text: str) -> bool:
        self.engine.runtime.refuse(f"{self.engine.component}: {text}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.gpu.stream(stream_handle)
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self.refuse(f"there is no profile {profile_index}")
        if profile_index != self.profile:
            self.profile, self.shapes = profile_index, {}
        self.changes += 1
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert isinstance(shape, tuple)
        if name not in self.engine.inputs:
            return self.refuse(f"{name} is no input")
        if self.profile is None:
            return self.refuse("no profile is chosen")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self.refuse(f"{name}: {shape} is not from {low} to {high}")
        self.shapes[name] = shape
        self.changes += 1
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self.engine.inputs:
            return self.shapes.get(name, self.engine.get_tensor_shape(name))
        if self.infer_shapes():
            return self.engine.get_tensor_shape(name)
        return output_shape(self.engine.content["onnx"], name, self.shapes)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self.refuse(f"{name} is no tensor of the engine")
        self.addresses[name] = memory
        self.changes += 1
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self.infer_shapes() else need(self.shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise Misuse(f"the arena is at {memory:#x}, not aligned to {ALIGNMENT}")
        if size < self.update_device_memory_size_for_shapes():
            self.refuse(f"{size} bytes are too few")
            return
        self.arena = (memory, size)
        self.changes += 1

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.gpu.stream(stream_handle)
        if missing := self.infer_shapes():
            return self.refuse(f"shapes of {missing} are not set")
        if missing := sorted(self.engine.tensors.keys() - self.addresses.keys()):
            return self.refuse(f"addresses of {missing} are not set")
        if self.arena is None or self.arena[1] < need(self.shapes):
            raise Misuse(f"{self.engine.component} runs without enough memory for activations")
        if stream.capture is not None and not self.gpu.capturable:
            stream.invalid = True
            return self.refuse("operation not permitted when stream is capturing")
        for name in self.engine.tensors:
            self.gpu.memory(self.addresses[name], self.bytes_of(name), name)
        self.compile(stream)
        work = functools.partial(self.compute, dict(self.shapes), dict(self.addresses), self.arena, self.changes)
        self.gpu.enqueue(stream, f"run {self.engine.component}", work)
        return True

    def compile(self, stream: Stream) -> None:
        """What TensorRT for RTX does at a run: kernels for new shapes, a graph for a run that repeats the last one."""
        config = self.config
        if config is None:
            return
        if config.dynamic_shapes_kernel_specialization_strategy is not Specialization.EAGER:
            raise Misuse("results depend on when the background compiler is done")
        shapes = [[name, list(shape)] for name, shape in sorted(self.shapes.items())]
        if config.cache is None or shapes not in config.cache.shapes:
            self.gpu.compiled.append((self.engine.component, shapes))
            if config.cache is not None:
                config.cache.shapes.append(shapes)
        if config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            places = (dict(self.shapes), dict(self.addresses), self.arena)
            if self.earlier_runs and places == self.earlier_runs[-1] and len(self.earlier_runs) == 1:
                self.gpu.captures.append(self.engine.component)
            elif self.earlier_runs and places != self.earlier_runs[-1]:
                self.earlier_runs.clear()
            self.earlier_runs.append(places)

    def bytes_of(self, name: str) -> int:
        dtype, _ = self.engine.tensors[name]
        return math.prod(self.get_tensor_shape(name)) * np.dtype(dtype).itemsize

    def compute(
        self, shapes: dict[str, Shape], addresses: dict[str, int], arena: tuple[int, int], changes: int
    ) -> None:
        """The run itself, when its turn has come."""
        if changes != self.changes and self.gpu.log[-1] == ("launch", None):
            raise Misuse("a graph is launched whose context was changed")
        scratch = self.gpu.memory(*arena, "the arena")
        feeds = {}
        for name, (dtype, _) in self.engine.inputs.items():
            size = math.prod(shapes[name]) * np.dtype(dtype).itemsize
            if self.gpu.written.get(addresses[name]) != size:
                written = self.gpu.written.get(addresses[name])
                raise Misuse(f"{self.engine.component} reads {name} of {size} bytes, {written} were written")
            content = self.gpu.memory(addresses[name], size, name)
            feeds[name] = content.view(dtype).reshape(shapes[name]).copy()
        scratch[: need(shapes)] = GARBAGE  # whoever keeps something in the arena loses it
        names = list(self.engine.outputs)
        for name, result in zip(names, graph_of(self.engine.content["onnx"]).run(names, feeds), strict=True):
            size = result.nbytes
            target = self.gpu.memory(addresses[name], size, name)
            target[:] = np.ascontiguousarray(result).view(np.uint8).reshape(-1)
            self.gpu.written[addresses[name]] = size


@functools.lru_cache(maxsize=16)
def graph_of(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def output_shape(path: str, name: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of an output, from the names of the graph's free dims and the inputs' shapes."""
    session = graph_of(path)
    sizes = {
        dim: size
        for node in session.get_inputs()
        for dim, size in zip(node.shape, shapes[node.name], strict=True)
        if isinstance(dim, str)
    }
    if "prompt_tokens" in sizes:
        sizes["text_tokens"] = sizes["prompt_tokens"] - PREFIX_TOKENS
    if "height" in sizes:
        sizes |= {"rows": sizes["height"] // SIDE_MULTIPLE, "columns": sizes["width"] // SIDE_MULTIPLE}
    elif "rows" in sizes:
        sizes |= {"height": sizes["rows"] * SIDE_MULTIPLE, "width": sizes["columns"] * SIDE_MULTIPLE}
    (dims,) = [node.shape for node in session.get_outputs() if node.name == name]
    return tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in dims)
