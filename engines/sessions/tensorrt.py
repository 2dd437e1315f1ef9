"""Engines that TensorRT or TensorRT for RTX executes, on a GPU.

Both modules have one API; where they differ, the code looks whether a name exists. An execution context holds shapes,
addresses and, for repeated runs, a CUDA graph; activations live in the device's arena, whose size TensorRT names for
the shapes at hand. The rules that contexts follow here are those of NVIDIA's guides (TensorRT "CUDA Graphs",
TensorRT for RTX "Optimizing Performance"): one context a captured graph, one plain run before the capture, memory of
activations shared among contexts.

The names of variables say which class of TensorRT they hold, see ``tests/engines/sessions/test_bindings.py``.
"""

import contextlib
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
from qie.engines.bundle.manifest import EngineRecord, TensorSpec
from qie.engines.errors import BundleError, EditError
from qie.engines.files import qie_home, replacing
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Block, Device, DeviceTensor

__all__ = ["TensorRtSession"]

DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}
"""TensorRT's names of the manifest's dtypes."""

LOOPED = ("transformer",)
"""Components that an edit runs again and again with the same tensors, for which CUDA graphs pay."""

PASSES = 2
"""Runs that take turns in the loop: with guidance, a negative and a positive pass."""

Shape = tuple[int, ...]
Places = tuple[tuple[str, int, Shape], ...]


@dataclass(slots=True, eq=False)
class Bound:
    """A context, and what it is bound to: (name, address, shape) of every tensor, a profile, an arena, a graph."""

    context: Any
    places: Places = ()
    profile: int = -1
    arena: Block = field(default_factory=lambda: Block(0, 0))
    runs: int = 0
    graph: cuda.Graph | None = None


class TensorRtSession:
    """One engine in the memory of a GPU."""

    rebinds = False  # a captured graph has its addresses in it

    def __init__(self, folder: Path, record: EngineRecord, device: Device) -> None:
        """Load the engine of ``record`` in the bundle ``folder``; its file is mapped, not read into memory.

        Raises:
            BundleError: the file is no engine of the installed TensorRT, or not the one that the manifest describes.
            EditError: the GPU has no room for it.
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
        self._check_contract(folder / record.path)
        self._ranges = [self._ranges_of(profile) for profile in range(self._engine.num_optimization_profiles)]
        looped = device.graphs and record.component in LOOPED
        self._most = PASSES if looped else 1
        self._config, self._cache = self._configure(looped)
        self._captures = looped and not hasattr(self._config, "cuda_graph_strategy")
        self._cached = b""
        self._load_cache()
        self._bound: deque[Bound] = deque()

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
        """Enqueue a run; failures on the GPU are met at ``download``.

        Raises:
            EditError: TensorRT refused the tensors, or the GPU has not enough memory.
        """
        tensors = {**inputs, **outputs}
        self._check_tensors(tensors)
        self._device.use()
        places = tuple((name, tensors[name].address, tensors[name].shape) for name in self._specs)
        bound = next((b for b in self._bound if b.places == places), None) or self._bind(places)
        if bound.arena != self._device.arena:
            self._drop_graph(bound)
            self._give_arena(bound)
        self._device.queue(partial(self._execute, bound))

    def close(self) -> None:
        """Release engine, contexts and graphs once the GPU is done."""
        self._device.use()
        self._device.synchronize()
        for bound in self._bound:
            self._drop_graph(bound)
        self._bound.clear()
        del self._config, self._cache, self._engine, self._runtime

    # Loading

    def _load(self, path: Path) -> Any:
        runtime, trt = self._runtime, self._trt
        self._messages.errors.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            said = self._messages.said()
            if "memory" in said.lower():
                free, total = cuda.memory()
                raise EditError(
                    f"the GPU has no room for {self._record.component} of {path.stat().st_size:,} bytes, {free:,} of "
                    f'{total:,} are free ({said}); build with residency = "sequential", or for a larger GPU'
                )
            raise BundleError(
                f"{trt.__name__} {trt.__version__} cannot load {path} ({said}); build the bundle again with `qie build`"
            )
        if engine.streamable_weights_size > 0:
            engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
        return engine

    def _check_contract(self, path: Path) -> None:
        """See that the file has the inputs and outputs of the manifest; TensorRT may know less of an output's dims."""
        trt, engine = self._trt, self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dims = tuple(engine.get_tensor_shape(name))
            mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
            place = "" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else " on the host"
            dtype = engine.get_tensor_dtype(name).name
            shown = _text(dims) if mode == "input" else f"of {len(dims)} dims"
            found[name] = f"{mode} {DTYPES.get(dtype, dtype)} {shown}{place}"
        expected = {
            spec.name: f"input {spec.dtype} {_text([-1 if isinstance(d, str) else d for d in spec.dims])}"
            for spec in self._record.inputs
        } | {spec.name: f"output {spec.dtype} of {len(spec.dims)} dims" for spec in self._record.outputs}
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                raise BundleError(
                    f"{path} has {name} as {found.get(name, 'nothing')}, the manifest as "
                    f"{expected.get(name, 'nothing')}; build the bundle again with `qie build`"
                )

    def _ranges_of(self, profile: int) -> dict[str, tuple[Shape, Shape]]:
        """The smallest and largest shape of every input with free dims."""
        ranges = {}
        for spec in self._record.inputs:
            if any(isinstance(dim, str) for dim in spec.dims):
                low, _, high = self._engine.get_tensor_profile_shape(spec.name, profile)
                ranges[spec.name] = (tuple(low), tuple(high))
        return ranges

    def _configure(self, looped: bool) -> tuple[Any, Any]:
        """How contexts are made, and the cache of kernels compiled on this machine; None where it does not exist.

        Kernels for a shape are compiled before its first run: results must not depend on when a compiler in the
        background is done.
        """
        trt, engine = self._trt, self._engine
        if not hasattr(engine, "create_runtime_config"):
            return None, None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "cuda_graph_strategy"):
            graphs = trt.CudaGraphStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if looped else graphs.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        return config, config.create_runtime_cache() if hasattr(config, "create_runtime_cache") else None

    def _new_context(self) -> Any:
        config, engine = self._config, self._engine
        if config is None:
            config = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(config)
        if context is None:
            raise self._refused("no context can be made")
        return context

    # The cache of kernels: TensorRT for RTX compiles for the GPU that it meets

    def _cache_path(self) -> Path:
        card = "".join(c if c.isalnum() else "-" for c in self._device.card.name.lower())
        return qie_home() / "cache" / self._record.backend / f"{self._record.key[:32]}-{card}.bin"

    def _load_cache(self) -> None:
        """Take what an earlier process compiled; TensorRT refuses what another driver or version left."""
        cache, config = self._cache, self._config
        if cache is None:
            return
        with contextlib.suppress(OSError):
            content = self._cache_path().read_bytes()
            cache.deserialize(content)
            self._cached = content
        config.set_runtime_cache(cache)

    def _save_cache(self) -> None:
        cache = self._cache
        if cache is None:
            return
        content = bytes(cache.serialize())
        if content == self._cached:
            return
        self._cached, path = content, self._cache_path()
        with contextlib.suppress(OSError):  # the next process compiles again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)

    # Binding

    def _bind(self, places: Places) -> Bound:
        """A context bound to ``places``: a new one while there are few, then the one that was bound first."""
        bound = self._bound.popleft() if len(self._bound) == self._most else Bound(self._new_context())
        self._drop_graph(bound)
        bound.places = ()  # so that a context that is bound halfway is not taken for bound
        self._bound.append(bound)
        context = bound.context
        shapes = {name: shape for name, _, shape in places}
        profile = self._profile(shapes)
        if profile != bound.profile:
            self._expect(context.set_optimization_profile_async(profile, int(self._device.stream)), "profile", profile)
            bound.profile = profile
        for spec in self._record.inputs:
            self._expect(context.set_input_shape(spec.name, shapes[spec.name]), spec.name, _text(shapes[spec.name]))
        missing = context.infer_shapes()
        if missing:
            raise self._refused(f"the shapes say nothing of {', '.join(missing)}")
        for spec in self._record.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if shape != shapes[spec.name]:
                raise self._refused(f"{spec.name} is {_text(shape)}, not {_text(shapes[spec.name])}")
        for name, address, _ in places:
            self._expect(context.set_tensor_address(name, address), name, "its address")
        self._give_arena(bound)
        bound.places = places
        return bound

    def _give_arena(self, bound: Bound) -> None:
        """Give the context the arena, grown to what its shapes need, or to what any shapes do where it does not say."""
        context, engine = bound.context, self._engine
        arena = self._device.reserve(context.update_device_memory_size_for_shapes() or engine.device_memory_size_v2)
        context.set_device_memory(arena.address, arena.size)
        bound.arena = arena

    def _drop_graph(self, bound: Bound) -> None:
        """Forget the graph, since what it was captured from changes."""
        if bound.graph is not None:
            self._device.synchronize()
            bound.graph.close()
        bound.graph, bound.runs = None, 0

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that takes ``shapes``."""
        for profile, ranges in enumerate(self._ranges):
            if all(_within(shapes[name], *limits) for name, limits in ranges.items()):
                return profile
        name, (low, high) = next(
            (name, limits) for name, limits in self._ranges[0].items() if not _within(shapes[name], *limits)
        )
        raise EditError(
            f"{self._record.component} takes {name} from {_text(low)} to {_text(high)}, not {_text(shapes[name])}; try "
            "another --size or fewer images, or build with wider shapes in the recipe"
        )

    # Running

    def _execute(self, bound: Bound) -> None:
        if bound.graph is None and bound.runs and self._captures:
            bound.graph = cuda.capture(self._device.stream, partial(self._enqueue, bound))
            self._captures = bound.graph is not None
        if bound.graph is not None:
            bound.graph.launch(self._device.stream)
        elif not self._enqueue(bound):
            raise self._refused("a run cannot be enqueued")
        elif not bound.runs:
            self._save_cache()
        bound.runs += 1

    def _enqueue(self, bound: Bound) -> bool:
        context = bound.context
        return bool(context.execute_async_v3(int(self._device.stream)))

    # Refusing

    def _check_tensors(self, tensors: Mapping[str, DeviceTensor]) -> None:
        if tensors.keys() != self._specs.keys():
            names = ", ".join(sorted(tensors.keys() ^ self._specs.keys()))
            raise self._refused(f"{names} is either missing or not among its inputs and outputs")
        for name, spec in self._specs.items():
            if tensors[name].dtype != spec.dtype or not _matches(tensors[name].shape, spec):
                found = f"{tensors[name].dtype.name} {_text(tensors[name].shape)}"
                raise self._refused(f"{name} is {found}, expected {spec.dtype} {_text(spec.dims)}")

    def _expect(self, taken: bool, name: str, value: object) -> None:
        if not taken:
            raise self._refused(f"{name} cannot be set to {value}")

    def _refused(self, what: str) -> EditError:
        said = self._messages.said()
        return EditError(
            f"{self._trt.__name__} refuses {self._record.component}: {what}{f' ({said})' if said else ''}; "
            "try a smaller --size or fewer images"
        )


@cache
def _logger(trt: Any) -> Any:
    """The logger of the module ``trt``, which listens to the first one of a process alone."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        """Keeps the last errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text.strip())

        def said(self) -> str:
            """The last errors, which are then forgotten."""
            text = "; ".join(self.errors)
            self.errors.clear()
            return text

    return Messages()


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _matches(shape: Shape, spec: TensorSpec) -> bool:
    dims = spec.dims
    return len(shape) == len(dims) and all(isinstance(d, str) or d == n for d, n in zip(dims, shape, strict=True))


def _text(shape: Any) -> str:
    return "x".join(str(dim) for dim in shape) or "one number"
