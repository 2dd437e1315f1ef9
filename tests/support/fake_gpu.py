"""A GPU that is none: CUDA's runtime and TensorRT as modules, over plain host memory behind invented addresses.

It does what the sessions rely on and refuses what the real ones refuse: an error code or False where they answer so,
``Misuse`` where they would crash, hang or compute from garbage. Work is queued and done late, as late as a wait for it
allows, so that a missing wait shows. An engine is a JSON file that names an ONNX graph, and onnxruntime executes it.

    gpu = Gpu(); gpu.install(monkeypatch, "tensorrt-rtx"); bundle = gpu.retarget(cpu_bundle, folder, "tensorrt-rtx")
"""

import ctypes
import functools
import itertools
import json
import math
import shutil
import sys
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from qie.engines import backends, machine
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import EngineRecord, FileRecord, ProfileRecord, write_manifest
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.files import sha256_of
from qie.engines.inputs.prompt import PREFIX_TOKENS
from qie.engines.sessions import choose

VERSION = "1.7.1"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
GARBAGE = 0xCD
ALIGNMENT = 256
SHAPES = {"batch": (1, 4), "layers": (1, 64)}
"""Range of a free dim by its name; others are 1 to 4096."""

Shape = tuple[int, ...]
Code = IntEnum(
    "Code",
    {
        "cudaSuccess": 0,
        "cudaErrorInvalidValue": 1,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorNoDevice": 100,
        "cudaErrorInvalidDevice": 101,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureUnsupported": 900,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)
OK = Code.cudaSuccess


class Misuse(AssertionError):
    """What a real GPU would answer with a crash or with garbage."""


class Handle:
    """An object of CUDA's, known by a number."""

    numbers = itertools.count(0x5000, 0x10)

    def __init__(self) -> None:
        self.number = next(self.numbers)
        self.alive = True

    def __int__(self) -> int:
        return self.number


class Stream(Handle):
    """Work to do, in order; while a capture is open, work goes to it instead."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[tuple[str, Callable[[], None]]] = deque()
        self.capture: list[tuple[str, Callable[[], None]]] | None = None
        self.invalid = False


class Event(Handle):
    """A mark in a stream's queue."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: Stream | None = None
        self.left = 0


class Graph(Handle):
    """Captured work."""

    def __init__(self, work: list[tuple[str, Callable[[], None]]]) -> None:
        super().__init__()
        self.work = work


@dataclass
class Gpu:
    """One fake GPU and all that is known of it. ``log`` has every call of weight: (name, detail)."""

    capability: str = "8.9"
    memory_bytes: int = 1 << 34
    driver: str = "580.95.05"
    cuda: str = "13.0"
    version: str = VERSION
    capturable: bool = True
    count: int = 1
    log: list[tuple[str, Any]] = field(default_factory=list)
    compiled: list[tuple[str, Any]] = field(default_factory=list)
    captures: list[str] = field(default_factory=list)
    in_use: int = 0
    peak: int = 0
    deepest: int = 0
    starved: int = 0
    device: int | None = None

    def __post_init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.written: dict[int, int] = {}
        self.streams: dict[int, Stream] = {}
        self.broken: Code | None = None
        self.refused: list[str] = []
        self.engines: list[weakref.ref[Engine]] = []
        self.contexts: list[weakref.ref[Context]] = []
        self._next = 0x7F0000000000

    # Use in a test

    def machine(self) -> machine.Machine:
        """A machine with this GPU."""
        gpu = machine.Gpu(name="Fake L40S", compute_capability=self.capability, memory_gib=16.0, driver=self.driver)
        return machine.Machine(
            system="test", processor="test", cores=1, memory_gib=1.0, gpus=(gpu,) * self.count, cuda=self.cuda
        )

    def install(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        """Put this GPU and the modules of the backends ``names`` in the place of the real ones."""
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime(self))
        for backend in names:
            monkeypatch.setitem(sys.modules, MODULES[backend], tensorrt(self, MODULES[backend], backend))
        monkeypatch.setattr(choose, "this_machine", self.machine)
        installed = {"cuda.bindings", "onnxruntime", *(MODULES[b] for b in names)}
        monkeypatch.setattr(backends, "installed", installed.__contains__)

    def retarget(self, bundle: Path, folder: Path, backend: str, **changes: Any) -> Path:
        """A copy of a CPU bundle whose engines are built for this GPU; ``changes`` go into the manifest's defaults."""
        shutil.copytree(bundle, folder)
        manifest = open_bundle(str(bundle)).manifest
        engines = tuple(self._engine(folder, record, backend) for record in manifest.engines)
        defaults = replace(manifest.defaults, **changes)
        write_manifest(replace(manifest, engines=engines, defaults=defaults), folder)
        return folder

    def _engine(self, folder: Path, record: EngineRecord, backend: str) -> EngineRecord:
        profiles = tuple(
            ProfileRecord(
                input=spec.name,
                **{
                    which: tuple(SHAPES.get(d, (1, 4096))[index] if isinstance(d, str) else d for d in spec.dims)
                    for which, index in (("min", 0), ("opt", 0), ("max", 1))
                },
            )
            for spec in record.inputs
            if any(isinstance(dim, str) for dim in spec.dims)
        )
        content = {
            "fake": MODULES[backend],
            "version": self.version,
            "capability": self.capability,
            "component": record.component,
            "onnx": str(folder / record.path),
            "weights": sum(file.bytes for file in record.files),
            "inputs": [[s.name, s.dtype, [-1 if isinstance(d, str) else d for d in s.dims]] for s in record.inputs],
            "outputs": [[s.name, s.dtype, [-1 if isinstance(d, str) else d for d in s.dims]] for s in record.outputs],
            "profiles": [{p.input: [p.min, p.opt, p.max] for p in profiles}],
        }
        path = folder / f"{record.component}.engine"
        path.write_text(json.dumps(content))
        file = FileRecord(path=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
        return replace(
            record,
            backend=backend,
            compute_capability=self.capability,
            backend_version=self.version,
            path=path.name,
            files=(file, *record.files),
            profiles=profiles,
        )

    # Memory

    def allocate(self, size: int) -> int:
        address = self._next
        self._next += -(-(size + 1) // ALIGNMENT) * ALIGNMENT * 2  # a gap, so that a reach past the end is found
        self.blocks[address] = np.full(size, GARBAGE, np.uint8)
        self.hold(size)
        return address

    def hold(self, size: int) -> None:
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def memory(self, address: int, size: int, what: str) -> NDArray[np.uint8]:
        """The ``size`` bytes at ``address``."""
        block = self.blocks.get(address)
        if block is None:
            raise Misuse(f"{what}: {address:#x} is not allocated, or was freed")
        if size > len(block):
            raise Misuse(f"{what}: {size} bytes at {address:#x}, which has {len(block)}")
        return block[:size]

    # Streams

    def stream(self, handle: Any) -> Stream:
        found = self.streams.get(int(handle))
        if found is None or not found.alive:
            raise Misuse(f"{int(handle):#x} is no stream")
        return found

    def enqueue(self, stream: Stream, label: str, work: Callable[[], None]) -> None:
        if stream.capture is not None:
            stream.capture.append((label, work))
            return
        stream.queue.append((label, work))
        self.log.append(("queue", label))
        self.deepest = max(self.deepest, sum(label.startswith("run") for label, _ in stream.queue))

    def finish(self, stream: Stream, left: int = 0) -> Code:
        """Do the work of ``stream`` until ``left`` pieces are left."""
        while len(stream.queue) > left:
            _, work = stream.queue.popleft()
            if self.broken is None:
                work()
        return self.broken or OK

    @property
    def capturing(self) -> bool:
        return any(s.capture is not None for s in self.streams.values())

    def unsafe(self) -> Code | None:
        """What a call answers that may not be made during a capture; the capture is lost then."""
        for stream in self.streams.values():
            if stream.capture is not None:
                stream.invalid = True
                return Code.cudaErrorStreamCaptureUnsupported
        return None


# CUDA


def runtime(gpu: Gpu) -> ModuleType:
    """The module ``cuda.bindings.runtime`` for ``gpu``."""
    module = ModuleType("cuda.bindings.runtime")

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*arguments: Any) -> tuple[Any, ...]:
            result = function(*arguments)
            return result if isinstance(result, tuple) else (result,)

        setattr(module, function.__name__, checked)
        return checked

    vars(module).update(
        cudaError_t=Code,
        cudaStreamNonBlocking=1,
        cudaEventDisableTiming=2,
        cudaEventBlockingSync=1,
        cudaMemcpyKind=Enum("cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost",
                                               "cudaMemcpyDeviceToDevice"]),
        cudaStreamCaptureMode=Enum("cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"]),
    )  # fmt: skip
    kinds = module.cudaMemcpyKind  # type: ignore[attr-defined]

    @call
    def cudaGetDeviceCount() -> Any:
        return (OK, gpu.count) if gpu.count else (Code.cudaErrorNoDevice, None)

    @call
    def cudaGetDeviceProperties(device: int) -> Any:
        major, minor = gpu.capability.split(".")
        return OK, SimpleNamespace(name=b"Fake L40S", major=int(major), minor=int(minor))

    @call
    def cudaSetDevice(device: int) -> Any:
        if not 0 <= device < gpu.count:
            return Code.cudaErrorInvalidDevice
        gpu.device = device
        return OK

    @call
    def cudaMemGetInfo() -> Any:
        return OK, gpu.memory_bytes - gpu.in_use, gpu.memory_bytes

    @call
    def cudaGetLastError() -> Any:
        return OK

    @call
    def cudaMalloc(size: int) -> Any:
        if code := gpu.unsafe():
            return code, None
        if size < 1:
            raise Misuse("cudaMalloc of nothing")
        gpu.log.append(("malloc", size))
        if gpu.in_use + size > gpu.memory_bytes:
            return Code.cudaErrorMemoryAllocation, None
        return OK, gpu.allocate(size)

    @call
    def cudaFree(address: int) -> Any:
        if code := gpu.unsafe():
            return code
        gpu.log.append(("free", address))
        if address not in gpu.blocks:
            raise Misuse(f"cudaFree of {address:#x}, which is not allocated")
        gpu.in_use -= len(gpu.blocks.pop(address))
        gpu.written.pop(address, None)
        return OK

    @call
    def cudaStreamCreateWithFlags(flags: int) -> Any:
        assert flags == 1
        stream = Stream()
        gpu.streams[stream.number] = stream
        return OK, stream

    @call
    def cudaStreamSynchronize(handle: Any) -> Any:
        if code := gpu.unsafe():
            return code
        gpu.log.append(("synchronize", None))
        return gpu.finish(gpu.stream(handle))

    @call
    def cudaStreamDestroy(handle: Any) -> Any:
        stream = gpu.stream(handle)
        gpu.finish(stream)
        stream.alive = False
        return OK

    @call
    def cudaEventCreateWithFlags(flags: int) -> Any:
        assert flags == 3
        return OK, Event()

    @call
    def cudaEventRecord(event: Event, handle: Any) -> Any:
        event.stream = gpu.stream(handle)
        if event.stream.capture is not None:
            raise Misuse("an event of the host's is recorded into a capture")
        event.left = len(event.stream.queue)
        gpu.enqueue(event.stream, "mark", functools.partial(setattr, event, "stream", None))
        return OK

    @call
    def cudaEventSynchronize(event: Event) -> Any:
        if code := gpu.unsafe():
            return code
        stream = event.stream
        if stream is None:
            return OK
        while event.stream is not None:
            gpu.finish(stream, len(stream.queue) - 1)
            if gpu.broken:
                return gpu.broken
        gpu.log.append(("wait", None))
        gpu.starved += not any(label.startswith("run") for label, _ in stream.queue)
        return OK

    @call
    def cudaEventDestroy(event: Event) -> Any:
        event.alive = False
        return OK

    @call
    def cudaMemcpyAsync(target: int, source: int, size: int, kind: Any, handle: Any) -> Any:
        stream = gpu.stream(handle)
        if kind == kinds.cudaMemcpyDeviceToDevice:

            def on_device() -> None:
                gpu.memory(target, size, "copy")[:] = gpu.memory(source, size, "copy")
                gpu.written[target] = size

            gpu.enqueue(stream, "copy on device", on_device)
            return OK
        if stream.capture is not None:
            raise Misuse("a copy of the host's is captured")
        if kind == kinds.cudaMemcpyHostToDevice:
            seen = ctypes.string_at(source, size)

            def to_device() -> None:
                if ctypes.string_at(source, size) != seen:
                    raise Misuse("an array changed before its copy was done")
                gpu.memory(target, size, "copy")[:] = np.frombuffer(seen, np.uint8)
                gpu.written[target] = size

            gpu.enqueue(stream, "copy to device", to_device)
            return OK
        ctypes.memset(target, GARBAGE, size)

        def to_host() -> None:
            ctypes.memmove(target, gpu.memory(source, size, "copy").ctypes.data, size)

        gpu.enqueue(stream, "copy to host", to_host)
        return OK

    @call
    def cudaStreamBeginCapture(handle: Any, mode: Any) -> Any:
        stream = gpu.stream(handle)
        stream.capture, stream.invalid = [], False
        return OK

    @call
    def cudaStreamEndCapture(handle: Any) -> Any:
        stream = gpu.stream(handle)
        captured, stream.capture = stream.capture, None
        assert captured is not None
        if stream.invalid:
            return Code.cudaErrorStreamCaptureInvalidated, None
        return OK, Graph(captured)

    @call
    def cudaGraphInstantiate(graph: Graph, flags: int) -> Any:
        assert graph.alive
        gpu.captures.append("cuda")
        return OK, Graph(graph.work)

    @call
    def cudaGraphLaunch(graph: Graph, handle: Any) -> Any:
        if not graph.alive:
            raise Misuse("a graph that was destroyed is launched")
        gpu.log.append(("launch", None))
        for label, work in graph.work:

            def checked(work: Callable[[], None] = work) -> None:
                if not graph.alive:
                    raise Misuse("a graph was destroyed before it was done")
                work()

            gpu.enqueue(gpu.stream(handle), label, checked)
        return OK

    @call
    def cudaGraphDestroy(graph: Graph) -> Any:
        graph.alive = False
        return OK

    @call
    def cudaGraphExecDestroy(graph: Graph) -> Any:
        graph.alive = False
        return OK

    return module


# TensorRT

DataType = Enum("DataType", ["FLOAT", "INT64", "UINT8", "BF16"])
DTYPES = {"float32": DataType.FLOAT, "int64": DataType.INT64, "uint8": DataType.UINT8}
Strategy = Enum("Strategy", ["STATIC", "USER_MANAGED"])
CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Specialization = Enum("Specialization", ["LAZY", "EAGER"])
Mode = Enum("Mode", ["INPUT", "OUTPUT"])
Location = Enum("Location", ["DEVICE", "HOST"])
Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])


class ILogger:
    """What an application's logger is made of."""

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def log(self, severity: Severity, text: str) -> None:
        raise NotImplementedError


def tensorrt(gpu: Gpu, name: str, backend: str) -> ModuleType:
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
    def __init__(self, gpu: Gpu, module: str, logger: ILogger) -> None:
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


class Engine:
    """ICudaEngine; its weights are in the GPU's memory until nothing holds it any more."""

    def __init__(self, runtime: Runtime, content: dict[str, Any]) -> None:
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


def release(gpu: Gpu, size: int) -> None:
    gpu.in_use -= size


def need(shapes: Mapping[str, Any]) -> int:
    """Bytes of activations: invented, but larger for larger shapes, and never a whole multiple of anything."""
    return 1000 + 8 * sum(math.prod(shape) for shape in shapes.values())


class RuntimeConfig:
    """IRuntimeConfig of TensorRT for RTX."""

    def __init__(self, engine: Engine) -> None:
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

    def __init__(self, gpu: Gpu) -> None:
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


class Context:
    """IExecutionContext with memory of the application's."""

    def __init__(self, engine: Engine, config: RuntimeConfig | None) -> None:
        self.engine, self.gpu, self.config = engine, engine.gpu, config
        self.gpu.contexts.append(weakref.ref(self))
        self.profile: int | None = None if engine.num_optimization_profiles > 1 else 0
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.arena: tuple[int, int] | None = None
        self.changes = 0
        self.seen: list[Any] = []

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
        """What TensorRT for RTX does at a run: kernels for new shapes, a graph for what is seen a second time."""
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
            if self.seen and places == self.seen[-1] and len(self.seen) == 1:
                self.gpu.captures.append(self.engine.component)
            elif self.seen and places != self.seen[-1]:
                self.seen.clear()
            self.seen.append(places)

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
