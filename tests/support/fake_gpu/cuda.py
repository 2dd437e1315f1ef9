"""The module ``cuda.bindings.runtime`` for a fake GPU."""

import ctypes
import functools
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

from tests.support.fake_gpu.device import GARBAGE, Device
from tests.support.fake_gpu.handles import OK, Code, Event, Graph, Misuse, Stream


def runtime(gpu: Device) -> ModuleType:
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
            content = ctypes.string_at(source, size)

            def to_device() -> None:
                if ctypes.string_at(source, size) != content:
                    raise Misuse("an array changed before its copy was done")
                gpu.memory(target, size, "copy")[:] = np.frombuffer(content, np.uint8)
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
