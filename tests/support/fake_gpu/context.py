"""IExecutionContext, and what a run of an engine computes: onnxruntime executes its graph.

Sources of what it answers: pyCore.cpp (``set_optimization_profile_async`` and ``infer_shapes`` raise RuntimeError, the
others return False or None), NvInferRuntime.h (``updateDeviceMemorySizeForShapes`` is 0 where shapes are missing,
``setDeviceMemoryV2`` returns nothing), NVIDIA's guide to CUDA graphs of TensorRT for RTX.
"""

import functools
import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from qie.engines.bfloat16 import widen
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.inputs.feeds import SCHEDULE_INPUTS
from qie.engines.inputs.prompt import PREFIX_TOKENS
from tests.support.fake_gpu.config import RtxRuntimeConfig, RuntimeConfig
from tests.support.fake_gpu.device import ALIGNMENT, GARBAGE
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.owned import Owned
from tests.support.fake_gpu.types import CudaGraphStrategy, Dims, Severity, Specialization, address

Shape = tuple[int, ...]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "int64": 8, "uint8": 1}


def need(shapes: Mapping[str, Any]) -> int:
    """Bytes of activations: invented, but larger for larger shapes, and never a whole multiple of anything."""
    computed = [shape for name, shape in shapes.items() if name not in SCHEDULE_INPUTS]  # of which a step is a row
    return 1000 + 8 * sum(math.prod(shape) for shape in computed)


class Context(Owned):
    """IExecutionContext; ``managed`` ones get their memory from the application."""

    def __init__(self, engine: Any, config: RuntimeConfig | None, *, managed: bool) -> None:
        if not managed:
            raise Misuse("a context that allocates by itself: the arena is not shared")
        self.engine, self.gpu = engine, engine.gpu
        rtx = config if isinstance(config, RtxRuntimeConfig) else None
        self._cache = rtx.native_cache if rtx else None
        self.cuda_graph_strategy = rtx.cuda_graph_strategy if rtx else None
        self.specialization = rtx.dynamic_shapes_kernel_specialization_strategy if rtx else None
        if self._cache is not None:
            self._cache.contexts += 1
        self.gpu.contexts.append(weakref.ref(self))
        self.profile: int | None = None if engine.num_optimization_profiles > 1 else 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.arena: tuple[int, int] | None = None
        self.changes = 0
        self.in_flight = [0]
        self.captured: Any = None
        self.repeats = 0

    def destroy(self) -> None:
        if self._cache is not None:
            self._cache.contexts -= 1
            if self._cache.destroyed:
                self.gpu.crash("a context is destroyed after the runtime cache that it was made with")
        if self.in_flight[0] and self.gpu.broken is None:
            self.gpu.crash("a context is destroyed while a run of it is in flight")

    def refuse(self, text: str) -> bool:
        self.engine.runtime.refuse(f"{self.engine.component}: {text}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """True, or RuntimeError (PY_ASSERT_RUNTIME_ERROR)."""
        self.gpu.stream(address(stream_handle))
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            self.refuse(f"there is no profile {profile_index}")
            raise RuntimeError("Error in set optimization profile async.")
        if profile_index != self.profile:
            self.profile, self.shapes = profile_index, {}
        self.changes += 1
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if not isinstance(shape, (tuple, list, Dims)):
            raise TypeError("set_input_shape(): incompatible function arguments")
        shape = tuple(shape)
        if any(not -(1 << 31) <= dim < 1 << 31 for dim in shape):
            raise RuntimeError("Unable to cast Python instance to C++ type 'int'")
        if name not in self.engine.inputs:
            return self.refuse(f"{name} is no input")
        if self.profile is None:
            return self.refuse("no profile is chosen")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self.refuse(f"{name}: {shape} is not from {tuple(low)} to {tuple(high)}")
        self.shapes[name] = shape
        self.changes += 1
        return True

    def infer_shapes(self) -> list[str]:
        """Names of inputs without a shape; RuntimeError where the dims of the inputs contradict each other."""
        missing = [name for name in self.engine.inputs if name not in self.shapes]
        if not missing and contradicts(self.engine.content["onnx"], self.shapes):
            self.refuse("the dims of inputs contradict each other")
            raise RuntimeError("infer_shapes error code: -1")
        return missing

    def get_tensor_shape(self, name: str) -> Dims:
        if name not in self.engine.tensors:
            return Dims()
        if name in self.engine.inputs:
            return Dims(self.shapes.get(name, self.engine.get_tensor_shape(name)))
        if self.unshaped:
            return Dims(self.engine.get_tensor_shape(name))
        return Dims(output_shape(self.engine.content["onnx"], name, self.shapes))

    @property
    def unshaped(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self.refuse(f"{name} is no tensor of the engine")
        self.addresses[name] = address(memory)
        self.changes += 1
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self.unshaped else need(self.shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        memory, size = address(memory), address(size)
        if memory % ALIGNMENT:
            raise Misuse(f"the arena is at {memory:#x}, not aligned to {ALIGNMENT}")
        if size < self.update_device_memory_size_for_shapes():
            self.refuse(f"{size} bytes are too few")
            return
        self.arena = (memory, size)
        self.changes += 1

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.gpu.stream(address(stream_handle))
        if not self.engine.ready:
            return self.refuse("the weights are not loaded")
        if missing := self.unshaped:
            return self.refuse(f"shapes of {missing} are not set")
        if missing := sorted(self.engine.tensors.keys() - self.addresses.keys()):
            return self.refuse(f"addresses of {missing} are not set")
        if self.arena is None or self.arena[1] < need(self.shapes):
            raise Misuse(f"{self.engine.component} runs without enough memory for activations")
        if stream.capture is not None and (self.engine.streaming or not self.gpu.capturable):
            stream.invalid = True
            return self.refuse("operation not permitted when stream is capturing")
        for name in self.engine.tensors:
            self.gpu.memory(self.addresses[name], self.bytes_of(name), name)
        arena = self.compile()
        work = functools.partial(self.compute, dict(self.shapes), dict(self.addresses), arena, self.changes)
        if stream.capture is None:
            self.in_flight[0] += 1
        self.gpu.enqueue(stream, f"run {self.engine.component}", work)
        if self.engine.streaming:  # "enqueueV3 will become synchronous"
            self.gpu.finish(stream)
        return True

    def compile(self) -> tuple[int, int]:
        """What TensorRT for RTX does at a run: kernels for new shapes, a CUDA graph for a run that repeats the last.

        Its graphs are found again by shapes and addresses of inputs and outputs; the memory of activations is not among
        them (strings of the library, ``create_cache_key``), so a graph writes into the arena that it was captured with.
        Returns the arena in which the run works.
        """
        assert self.arena is not None
        if self.specialization is None:  # not TensorRT for RTX
            return self.arena
        if self.specialization is Specialization.LAZY:
            raise Misuse("results depend on when the background compiler is done")
        if self._cache is not None and self._cache.destroyed:
            self.gpu.crash("a run reads a runtime cache that was destroyed")
        if self.specialization is Specialization.EAGER:
            shapes = [[name, list(shape)] for name, shape in sorted(self.shapes.items())]
            if self._cache is None or shapes not in self._cache.shapes:
                self.gpu.compiled.append((self.engine.component, shapes))
                if self._cache is not None:
                    self._cache.shapes.append(shapes)
        if self.cuda_graph_strategy is not CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            return self.arena
        places = (dict(self.shapes), dict(self.addresses))
        if self.engine.streaming or not self.gpu.capturable:
            self.engine.runtime.logger.log(Severity.WARNING, "The graph is not graph capturable. Falling back")
            return self.arena
        if self.captured is None or self.captured[0] != places:
            self.captured, self.repeats = (places, self.arena), 0
            return self.arena
        self.repeats += 1
        if self.repeats == 1:
            self.gpu.captures.append(self.engine.component)
            self.captured = (places, self.arena)
        return self.captured[1]

    def bytes_of(self, name: str) -> int:
        dtype, _ = self.engine.tensors[name]
        return math.prod(self.get_tensor_shape(name)) * ITEMSIZE[dtype]

    def compute(
        self, shapes: dict[str, Shape], addresses: dict[str, int], arena: tuple[int, int], changes: int
    ) -> None:
        """The run itself, when its turn has come."""
        self.in_flight[0] = max(0, self.in_flight[0] - 1)
        if changes != self.changes and self.gpu.log[-1] == ("launch", None):
            raise Misuse("a graph is launched whose context was changed")
        scratch = self.gpu.memory(*arena, "the arena")
        feeds = {}
        for name, (dtype, _) in self.engine.inputs.items():
            size = math.prod(shapes[name]) * ITEMSIZE[dtype]
            if self.gpu.written.get(addresses[name]) != size:
                written = self.gpu.written.get(addresses[name])
                raise Misuse(f"{self.engine.component} reads {name} of {size} bytes, {written} were written")
            content = self.gpu.memory(addresses[name], size, name).copy()
            feeds[name] = plain(content, dtype).reshape(shapes[name])
        scratch[: need(shapes)] = GARBAGE  # whoever keeps something in the arena loses it
        names = list(self.engine.outputs)
        for name, result in zip(names, graph_of(self.engine.content["onnx"]).run(names, feeds), strict=True):
            size = result.nbytes
            target = self.gpu.memory(addresses[name], size, name)
            target[:] = np.ascontiguousarray(result).view(np.uint8).reshape(-1)
            self.gpu.written[addresses[name]] = size


def plain(content: Any, dtype: str) -> Any:
    """The values in bytes of the GPU; bfloat16 as float32, in which the graphs behind the fake compute."""
    return widen(content.view(np.uint16)) if dtype == "bfloat16" else content.view(dtype)


@functools.lru_cache(maxsize=16)
def graph_of(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def contradicts(path: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether two inputs give different sizes to one free dim."""
    sizes: dict[str, int] = {}
    for node in graph_of(path).get_inputs():
        for dim, size in zip(node.shape, shapes[node.name], strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                return True
    if "tokens" not in sizes:
        return False
    latent_tokens = sizes["noise_tokens"] + sizes["reference_tokens"]
    total = latent_tokens + sizes["text_tokens"]
    return sizes["tokens"] != total or sizes.get("latent_tokens", latent_tokens) != latent_tokens


def output_shape(path: str, name: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of an output, from the names of the graph's free dims and the inputs' shapes."""
    session = graph_of(path)
    sizes = {
        dim: size
        for node in session.get_inputs()
        for dim, size in zip(node.shape, shapes[node.name], strict=True)
        if isinstance(dim, str)
    }
    if "noise_tokens" in sizes:
        sizes["latent_tokens"] = sizes["noise_tokens"] + sizes["reference_tokens"]
    if "prompt_tokens" in sizes:
        sizes["text_tokens"] = sizes["prompt_tokens"] - PREFIX_TOKENS
    if "height" in sizes:
        sizes |= {"rows": sizes["height"] // SIDE_MULTIPLE, "columns": sizes["width"] // SIDE_MULTIPLE}
    elif "rows" in sizes:
        sizes |= {"height": sizes["rows"] * SIDE_MULTIPLE, "width": sizes["columns"] * SIDE_MULTIPLE}
    (dims,) = [node.shape for node in session.get_outputs() if node.name == name]
    return tuple(sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in dims)
