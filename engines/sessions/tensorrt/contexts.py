"""Execution contexts: what holds the shapes, addresses and arena of a run, and its CUDA graph.

The rules are those of NVIDIA's guides (TensorRT "CUDA Graphs", TensorRT for RTX "Optimizing Performance"): one context
per CUDA graph, one plain run before the capture, memory of activations shared among contexts.

Destruction has an order, for which the library crashes otherwise: contexts, their config, the runtime cache, the
engine. Bindings keep an engine alive for its contexts (pyCore.cpp, ``keep_alive<0, 1>``) and nothing else, so a context
is tied to the rest here (``_keep_alive``), whoever still holds it: the frames of an exception, for example.

Variables are named for the class of TensorRT that they hold, see ``tests/engines/sessions/test_bindings.py``.
"""

import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import EngineError, RequestError
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Block, Device
from qie.engines.sessions.tensorrt.contract import Shape, profile_ranges, shape_text, within
from qie.engines.sessions.tensorrt.kernel_cache import KernelCache, cache_path
from qie.engines.sessions.tensorrt.messages import raising

__all__ = ["Bindings", "Contexts"]

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

    def close(self) -> None:
        """Release context and CUDA graph, of which no run may be in flight."""
        graph, self.cuda_graph = self.cuda_graph, None
        self.context, self.bindings = None, ()
        if graph is not None:
            graph.close()


class Contexts:
    """The execution contexts of one engine, at most as many as take turns, each bound to a set of tensors."""

    def __init__(
        self, trt: Any, messages: Any, engine: Any, record: EngineRecord, device: Device, *, streams: bool
    ) -> None:
        """Configure contexts; none is made. An engine that ``streams`` its weights cannot be captured."""
        self._trt, self._messages, self._engine = trt, messages, engine
        self._record, self._device = record, device
        self._ranges = [profile_ranges(engine, record, p) for p in range(engine.num_optimization_profiles)]
        looped = record.component in LOOPED
        self._most = PASSES if looped else 1
        self._contexts: deque[BoundContext] = deque()
        self._shapes_run: set[tuple[Shape, ...]] = set()
        self._config: Any = None
        self._kernels: KernelCache | None = None
        with self._refused("contexts cannot be configured"):
            self._captured_by_tensorrt = self._configure(captures=looped and not streams)
        by_session = looped and not streams and device.options.cuda_graphs is not False
        self._captures = by_session and not hasattr(self._config, "cuda_graph_strategy")

    @property
    def captured(self) -> bool:
        """Whether runs are captured, here or behind TensorRT's API; there, a warning tells where they are not."""
        refused = any("not graph capturable" in text for text in self._messages.warnings)
        return self.cuda_graphs > 0 or (self._captured_by_tensorrt and not refused)

    @property
    def cuda_graphs(self) -> int:
        """Captured CUDA graphs; 0 where TensorRT captures them itself."""
        return sum(bound.cuda_graph is not None for bound in self._contexts)

    def run(self, bindings: Bindings) -> None:
        """Enqueue a run with the tensors ``bindings``.

        Raises:
            RequestError: a shape is outside the engine's profiles.
            EngineError: TensorRT failed, or the GPU is out of memory.
        """
        bound = next((c for c in self._contexts if c.bindings == bindings), None)
        if bound is None:
            bound = self._bind(bindings)
        elif bound.arena != self._device.arena:
            bound = self._move(bound)
        self._device.queue(partial(self._execute, bound))

    def drop_graphs(self) -> None:
        """Drop all CUDA graphs, because what they were captured from changes."""
        for bound in self._contexts:
            self._drop_graph(bound)

    def close(self) -> None:
        """Save the kernels, then release contexts and CUDA graphs. No run may be in flight."""
        with ExitStack() as stack:  # last in, first out; no failure skips what is left
            stack.callback(self._forget)
            for bound in self._contexts:
                stack.callback(bound.close)
            if self._kernels is not None:
                stack.callback(self._kernels.save)

    def _forget(self) -> None:
        self._contexts.clear()
        self._config = None
        self._kernels = None
        self._engine = None

    # Configuration

    def _configure(self, *, captures: bool) -> bool:
        """Make the configuration of contexts, and the cache of kernels compiled on this machine, where supported.

        TensorRT for RTX captures CUDA graphs behind its API and finds them again by the addresses of inputs and
        outputs, not by that of the arena, so it does so only on request. Returns whether it does.
        """
        trt, engine, options = self._trt, self._engine, self._device.options
        self._messages.errors.clear()
        if not hasattr(engine, "create_runtime_config"):
            return False
        config = self._config = engine.create_runtime_config()
        if config is None:
            raise self._failed("contexts cannot be configured")
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        by_tensorrt = hasattr(config, "cuda_graph_strategy") and captures and options.cuda_graphs is True
        if hasattr(config, "cuda_graph_strategy"):
            strategy = trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if by_tensorrt else strategy.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = {"none": kinds.NONE, "eager": kinds.EAGER}[
                options.specialization
            ]
        if hasattr(config, "create_runtime_cache"):
            path = cache_path(self._record.backend, self._record.key, self._device.gpu.name)
            self._kernels = KernelCache.open(config, path)
        return by_tensorrt

    def _new_context(self) -> Any:
        config, engine = self._config, self._engine
        with self._refused("no execution context can be created"):
            if config is None:
                context = engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            else:
                context = engine.create_execution_context(config)
        if context is None:
            raise self._failed("no execution context can be created")
        if self._kernels is not None:
            _keep_alive(context, self._kernels.cache)
        if config is not None:
            _keep_alive(context, config)
        return context

    # Binding

    def _bind(self, bindings: Bindings) -> BoundContext:
        """A context bound to ``bindings``: a new one up to the maximum, then the one that was bound first."""
        reused = self._contexts.popleft() if len(self._contexts) == self._most else None
        bound = reused if reused is not None else BoundContext(self._new_context())
        self._drop_graph(bound)
        bound.bindings = ()  # a context that is bound only in part must not be found by ``run``
        self._contexts.append(bound)
        context, record = bound.context, self._record
        self._messages.errors.clear()  # of what was allowed to fail
        shapes = {name: shape for name, _, shape in bindings}
        profile = self._profile(shapes)
        if profile != bound.profile:
            with self._refused(f"profile cannot be set to {profile}"):
                self._expect(
                    context.set_optimization_profile_async(profile, int(self._device.stream)), "profile", profile
                )
            bound.profile = profile
        for spec in record.inputs:
            shape = shapes[spec.name]
            with self._refused(f"{spec.name} cannot be set to {shape_text(shape)}"):
                self._expect(context.set_input_shape(spec.name, shape), spec.name, shape_text(shape))
        with self._refused("its inputs have shapes that do not belong together"):
            missing = context.infer_shapes()
        if missing:
            raise self._failed(f"the shapes of {', '.join(missing)} are unknown")
        for spec in record.outputs:
            with self._refused(f"the shape of {spec.name} is unknown"):
                shape = tuple(context.get_tensor_shape(spec.name))
            passed = f"{spec.name} is {shape_text(shapes[spec.name])}, expected {shape_text(shape)}"
            assert shape == shapes[spec.name], f"{record.component}: {passed}"
        for name, address, _ in bindings:
            with self._refused(f"{name} cannot be set to its address"):
                self._expect(context.set_tensor_address(name, address), name, "its address")
        self._attach_arena(bound)
        bound.bindings = bindings
        return bound

    def _move(self, bound: BoundContext) -> BoundContext:
        """``bound`` with the arena where that is now.

        A context that captures behind TensorRT's API is replaced by a new one, because its graphs write to the old
        arena.
        """
        if self._captured_by_tensorrt:
            self._device.synchronize()
            bindings, bound.bindings = bound.bindings, ()
            self._contexts.remove(bound)
            bound.context = None
            return self._bind(bindings)
        self._drop_graph(bound)
        self._attach_arena(bound)
        return bound

    def _attach_arena(self, bound: BoundContext) -> None:
        """Attach the arena, grown to what the context's shapes need, or to the engine's maximum where unknown."""
        context, engine = bound.context, self._engine
        with self._refused("its memory is unknown"):
            size = context.update_device_memory_size_for_shapes() or engine.device_memory_size_v2
        arena = self._device.reserve(size)
        with self._refused("the arena cannot be set"):
            context.set_device_memory(arena.address, arena.size)
        bound.arena = arena

    def _drop_graph(self, bound: BoundContext) -> None:
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
        elif not bound.runs:
            self._save_kernels(bound)
        bound.runs += 1

    def _enqueue(self, bound: BoundContext) -> bool:
        context = bound.context
        with self._refused("a run cannot be enqueued"):
            return bool(context.execute_async_v3(int(self._device.stream)))

    def _save_kernels(self, bound: BoundContext) -> None:
        """Save the kernels after the first run for which any were compiled."""
        each = self._device.options.specialization == "eager"
        shapes = tuple(shape for _, _, shape in bound.bindings if each)
        if self._kernels is not None and shapes not in self._shapes_run:
            self._kernels.save()
        self._shapes_run.add(shapes)

    # Failures

    def _refused(self, reason: str) -> AbstractContextManager[None]:
        """Turn what the bindings raise in the block into an error with ``reason``."""
        return raising(lambda problem: self._failed(f"{reason}: {problem}"))

    def _expect(self, taken: bool, name: str, value: object) -> None:
        if not taken:
            raise self._failed(f"{name} cannot be set to {value}")

    def _failed(self, reason: str) -> EngineError:
        """An error with what TensorRT logged; a smaller edit helps where memory is short, as in most failed runs."""
        errors = self._messages.take()
        return EngineError(
            f"{self._trt.__name__} cannot run {self._record.component}, {reason}{f' ({errors})' if errors else ''}; "
            "use a smaller size or fewer images, or see `qie selftest`",
            option="size",
        )


def _keep_alive(context: Any, needed: Any) -> None:
    """Keep ``needed`` until ``context`` is destroyed, as pybind11's ``keep_alive`` does: the callback of a weak
    reference is called after the object behind it is gone (pybind11/detail/class.h, ``clear_instance``)."""
    weakref.finalize(context, _drop, needed).atexit = False


def _drop(needed: Any) -> None:
    """Hold nothing any more."""
