"""Engines that TensorRT or TensorRT for RTX executes, on a GPU.

Both modules have one API; where they differ, the code checks whether a name exists. An execution context holds shapes,
addresses and, for repeated runs, a CUDA graph; activations are in the device's arena, whose size TensorRT reports for
the current shapes. The rules for contexts are those of NVIDIA's guides (TensorRT "CUDA Graphs", TensorRT for RTX
"Optimizing Performance"): one context per CUDA graph, one plain run before the capture, memory of activations shared
among contexts.

Variables are named for the class of TensorRT that they hold, see ``tests/engines/sessions/test_bindings.py``.
"""

import mmap
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BundleError, EngineError, RequestError
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Block, Device, DeviceTensor
from qie.engines.sessions.tensorrt.contract import Shape, check_contract, matches, profile_ranges, shape_text, within
from qie.engines.sessions.tensorrt.kernel_cache import KernelCache, cache_path

__all__ = ["TensorRtSession"]

LOOPED = ("transformer",)
"""Components that an edit runs repeatedly with the same tensors, for which CUDA graphs pay off."""

PASSES = 2
"""Runs that alternate in the loop: with guidance, a negative and a conditional pass."""

Bindings = tuple[tuple[str, int, Shape], ...]
"""(name, address, shape) of every tensor."""


@dataclass(slots=True, eq=False)
class BoundContext:
    """An execution context, what it is bound to, and the CUDA graph of its run."""

    context: Any
    bindings: Bindings = ()
    profile: int = -1
    arena: Block = field(default_factory=lambda: Block(0, 0))
    runs: int = 0
    cuda_graph: cuda.CudaGraph | None = None


class TensorRtSession:
    """One engine in the memory of a GPU."""

    rebinds = False  # a CUDA graph holds addresses

    def __init__(self, folder: Path, record: EngineRecord, device: Device) -> None:
        """Load the engine of ``record`` in the bundle ``folder``; its file is mapped, not read into memory.

        Raises:
            BundleError: the file is not an engine of the installed TensorRT, or not the one in the manifest.
            EngineError: the GPU is out of memory.
        """
        self._trt = import_module(BACKENDS[record.backend].modules[0])
        self._record = record
        self._device = device
        self._specs = {spec.name: spec for spec in (*record.inputs, *record.outputs)}
        self._outputs = {spec.name: spec for spec in record.outputs}
        self._messages = _logger(self._trt)
        device.use()
        self._runtime = self._trt.Runtime(self._messages)
        self._engine = self._load(folder / record.path)
        check_contract(self._trt, self._engine, record, folder / record.path)
        profiles = range(self._engine.num_optimization_profiles)
        self._ranges = [profile_ranges(self._engine, record, profile) for profile in profiles]
        looped = device.cuda_graphs and record.component in LOOPED
        self._contexts_max = PASSES if looped else 1
        self._config, self._kernels = self._configure(looped)
        self._captures = looped and not hasattr(self._config, "cuda_graph_strategy")
        self._contexts: deque[BoundContext] = deque()

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """A tensor on the GPU with the content of ``array``."""
        return self._device.upload(array)

    def empty(self, name: str, sizes: Mapping[str, int]) -> DeviceTensor:
        """A tensor on the GPU for the output ``name`` where ``sizes`` gives the free dims."""
        spec = self._outputs[name]
        return self._device.empty(spec.shape(sizes), spec.dtype)

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Enqueue a copy on the GPU."""
        self._device.copy(source, target)

    def download(self, tensor: DeviceTensor) -> NDArray[np.generic]:
        """The content of ``tensor``, once all work so far is done."""
        return self._device.download(tensor)

    def run(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> None:
        """Enqueue a run; a failure on the GPU is raised by ``download``.

        Raises:
            RequestError: a shape is outside the engine's profiles.
            EngineError: TensorRT failed, or the GPU is out of memory.
        """
        tensors = {**inputs, **outputs}
        self._check_tensors(tensors)
        self._device.use()
        bindings = tuple((name, tensors[name].address, tensors[name].shape) for name in self._specs)
        bound = next((c for c in self._contexts if c.bindings == bindings), None) or self._bind(bindings)
        if bound.arena != self._device.arena:
            self._invalidate_graph(bound)
            self._attach_arena(bound)
        self._device.queue(partial(self._execute, bound))

    def close(self) -> None:
        """Release engine, contexts and CUDA graphs once the GPU is done."""
        self._device.use()
        self._device.synchronize()
        for bound in self._contexts:
            self._invalidate_graph(bound)
        self._contexts.clear()
        del self._config, self._kernels, self._engine, self._runtime

    @property
    def activation_bytes(self) -> int:
        """Memory that a run of the largest shapes needs beside the weights."""
        return int(self._engine.device_memory_size_v2)

    @property
    def cuda_graphs(self) -> int:
        """Captured CUDA graphs; 0 where TensorRT captures them itself."""
        return sum(bound.cuda_graph is not None for bound in self._contexts)

    # Loading

    def _load(self, path: Path) -> Any:
        runtime, trt = self._runtime, self._trt
        self._messages.errors.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            errors = self._messages.take()
            if "memory" in errors.lower():
                free, total = cuda.memory()
                raise EngineError(
                    f"{self._record.component} has {path.stat().st_size:,} bytes, the GPU {free:,} of {total:,} bytes "
                    f'free ({errors}); build with residency = "sequential", or for a larger GPU'
                )
            raise BundleError(
                f"{trt.__name__} {trt.__version__} cannot load {path} ({errors}); build the bundle again with "
                "`qie build`"
            )
        if engine.streamable_weights_size > 0:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _configure(self, looped: bool) -> tuple[Any, KernelCache | None]:
        """The configuration of contexts and the cache of kernels compiled on this machine; None where not supported.

        Kernels for a shape are compiled before its first run, because results must not depend on when a compiler in the
        background finishes.
        """
        trt, engine = self._trt, self._engine
        if not hasattr(engine, "create_runtime_config"):
            return None, None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "cuda_graph_strategy"):
            strategy = trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if looped else strategy.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if not hasattr(config, "create_runtime_cache"):
            return config, None
        record, gpu = self._record, self._device.gpu.name
        kernels = KernelCache(config.create_runtime_cache(), cache_path(record.backend, record.key, gpu))
        kernels.load(config)
        return config, kernels

    def _new_context(self) -> Any:
        config, engine = self._config, self._engine
        if config is None:
            config = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(config)
        if context is None:
            raise self._failed("no execution context can be created")
        return context

    # Binding

    def _bind(self, bindings: Bindings) -> BoundContext:
        """A context bound to ``bindings``: a new one up to the maximum, then the one that was bound first."""
        bound = (
            self._contexts.popleft() if len(self._contexts) == self._contexts_max else BoundContext(self._new_context())
        )
        self._invalidate_graph(bound)
        bound.bindings = ()  # a context that is bound only in part must not be found by ``run``
        self._contexts.append(bound)
        context = bound.context
        shapes = {name: shape for name, _, shape in bindings}
        profile = self._profile(shapes)
        if profile != bound.profile:
            self._expect(context.set_optimization_profile_async(profile, int(self._device.stream)), "profile", profile)
            bound.profile = profile
        for spec in self._record.inputs:
            self._expect(
                context.set_input_shape(spec.name, shapes[spec.name]), spec.name, shape_text(shapes[spec.name])
            )
        missing = context.infer_shapes()
        if missing:
            raise self._failed(f"the shapes of {', '.join(missing)} are unknown")
        for spec in self._record.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            passed = f"{spec.name} is {shape_text(shapes[spec.name])}, expected {shape_text(shape)}"
            assert shape == shapes[spec.name], f"{self._record.component}: {passed}"
        for name, address, _ in bindings:
            self._expect(context.set_tensor_address(name, address), name, "its address")
        self._attach_arena(bound)
        bound.bindings = bindings
        return bound

    def _attach_arena(self, bound: BoundContext) -> None:
        """Attach the arena, grown to what the context's shapes need, or to the engine's maximum where unknown."""
        context, engine = bound.context, self._engine
        arena = self._device.reserve(context.update_device_memory_size_for_shapes() or engine.device_memory_size_v2)
        context.set_device_memory(arena.address, arena.size)
        bound.arena = arena

    def _invalidate_graph(self, bound: BoundContext) -> None:
        """Drop the CUDA graph, because what it was captured from changes."""
        if bound.cuda_graph is not None:
            self._device.synchronize()
            bound.cuda_graph.close()
        bound.cuda_graph, bound.runs = None, 0

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that takes ``shapes``.

        Raises:
            RequestError: none does.
        """
        for profile, ranges in enumerate(self._ranges):
            if all(within(shapes[name], *limits) for name, limits in ranges.items()):
                return profile
        name, (low, high) = next(
            (name, limits) for name, limits in self._ranges[0].items() if not within(shapes[name], *limits)
        )
        raise RequestError(
            f"{name} of {self._record.component} is {shape_text(shapes[name])}, expected {shape_text(low)} to "
            f"{shape_text(high)}; use another size or fewer images, or build with wider shapes in the recipe",
            option="size",
        )

    # Running

    def _execute(self, bound: BoundContext) -> None:
        if bound.cuda_graph is None and bound.runs and self._captures:
            bound.cuda_graph = cuda.capture(self._device.stream, partial(self._enqueue, bound))
            self._captures = bound.cuda_graph is not None
        if bound.cuda_graph is not None:
            bound.cuda_graph.launch(self._device.stream)
        elif not self._enqueue(bound):
            raise self._failed("a run cannot be enqueued")
        elif not bound.runs and self._kernels is not None:
            self._kernels.save()
        bound.runs += 1

    def _enqueue(self, bound: BoundContext) -> bool:
        context = bound.context
        return bool(context.execute_async_v3(int(self._device.stream)))

    # Checks and failures

    def _check_tensors(self, tensors: Mapping[str, DeviceTensor]) -> None:
        """Assert that the caller passed the inputs and outputs of the manifest."""
        names = tensors.keys() ^ self._specs.keys()
        assert not names, f"{self._record.component}: {', '.join(sorted(names))} missing or unknown"
        for name, spec in self._specs.items():
            tensor = tensors[name]
            fits = tensor.dtype == spec.dtype and matches(tensor.shape, spec)
            passed = f"{tensor.dtype.name} {shape_text(tensor.shape)}"
            assert fits, f"{self._record.component}: {name} is {passed}, expected {spec.dtype} {shape_text(spec.dims)}"

    def _expect(self, taken: bool, name: str, value: object) -> None:
        if not taken:
            raise self._failed(f"{name} cannot be set to {value}")

    def _failed(self, reason: str) -> EngineError:
        errors = self._messages.take()
        return EngineError(
            f"{self._trt.__name__} cannot run {self._record.component}, {reason}{f' ({errors})' if errors else ''}; "
            "use a smaller size or fewer images",
            option="size",
        )


@cache
def _logger(trt: Any) -> Any:
    """The logger of the module ``trt``; TensorRT uses the first one of a process only."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        """Keeps the latest errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text.strip())

        def take(self) -> str:
            """The latest errors as text; they are then cleared."""
            text = ", ".join(self.errors)
            self.errors.clear()
            return text

    return Messages()
