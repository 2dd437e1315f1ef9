"""The part of CUDA's runtime API that the sessions use: every call is checked, every failure has CUDA's name.

A call of ``cuda.bindings.runtime`` (cuda-python, imported at the first call) returns an error code and its results;
the functions here check the code and return the results. Addresses are integers, sizes are bytes. Everything
works on the GPU that ``use`` chose in this thread.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

from qie.engines.errors import EngineError, EngineMismatchError, QieError, first_line

__all__ = [
    "CudaGraph",
    "Event",
    "Stream",
    "allocate",
    "capture",
    "copy_on_device",
    "copy_to_device",
    "copy_to_host",
    "free",
    "memory",
    "use",
]


def use(index: int) -> None:
    """Choose the GPU of this thread by its index (``qie.engines.gpus.Gpu``).

    Raises:
        EngineMismatchError: it cannot be used.
    """
    _call("cudaSetDevice", index, kind=EngineMismatchError)


def memory() -> tuple[int, int]:
    """Free memory and all memory of the GPU."""
    free_bytes, total_bytes = _call("cudaMemGetInfo")
    return free_bytes, total_bytes


def allocate(size: int) -> int:
    """The address of new memory of ``size`` bytes (at least 1), aligned for every use; its content is undefined.

    Raises:
        EngineError: the GPU is out of memory.
    """
    results, problem = _attempt("cudaMalloc", size)
    if problem is None:
        return int(results[0])
    _forget()
    if problem != "cudaErrorMemoryAllocation":
        raise EngineError(_sentence("cudaMalloc", problem))
    free_bytes, total_bytes = memory()
    raise EngineError(
        f"the GPU is out of memory ({problem}), {size:,} bytes were requested, {free_bytes:,} of {total_bytes:,} are "
        'free; use a smaller size or fewer images, or build with residency = "sequential"',
        option="size",
    )


def free(address: int) -> None:
    """Free memory of ``allocate``; no work in flight may use it."""
    _call("cudaFree", address)


class Stream:
    """A queue of work on the GPU, done in order, concurrently with other streams."""

    def __init__(self) -> None:
        self._handle = _call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)

    def __int__(self) -> int:
        return int(self._handle)

    @property
    def handle(self) -> Any:
        """The handle that CUDA's calls take."""
        return self._handle

    def synchronize(self) -> None:
        """Wait until all work is done.

        Raises:
            EngineError: some of it failed.
        """
        _call("cudaStreamSynchronize", self._handle)

    def close(self) -> None:
        """Destroy the stream."""
        _call("cudaStreamDestroy", self._handle)


class Event:
    """A mark in a stream that the host can wait for; waiting lets the CPU sleep."""

    def __init__(self) -> None:
        runtime = _runtime()
        self._handle = _call("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming | runtime.cudaEventBlockingSync)

    def record(self, stream: Stream) -> None:
        """Set the mark behind the work that is in ``stream`` now."""
        _call("cudaEventRecord", self._handle, stream.handle)

    def wait(self) -> None:
        """Wait until the work before the mark is done; at once where no mark was set.

        Raises:
            EngineError: some work failed.
        """
        _call("cudaEventSynchronize", self._handle)

    def close(self) -> None:
        """Destroy the event."""
        _call("cudaEventDestroy", self._handle)


class CudaGraph:
    """Work that was captured from a stream, launched repeatedly as a whole."""

    def __init__(self, captured: Any) -> None:
        self._handle = _call("cudaGraphInstantiate", captured, 0)

    def launch(self, stream: Stream) -> None:
        """Enqueue the work: the same kernels at the same addresses."""
        _call("cudaGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Destroy the graph, which must not be in flight."""
        _call("cudaGraphExecDestroy", self._handle)


def capture(stream: Stream, enqueue: Callable[[], bool]) -> CudaGraph | None:
    """Capture the work that ``enqueue`` puts into ``stream``; None where it cannot be captured.

    ``enqueue`` returns False if it failed. The captured work is not done, and the stream is unchanged in any case.
    """
    mode = _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    _call("cudaStreamBeginCapture", stream.handle, mode)
    done, captured = False, None
    try:
        done = enqueue()
    finally:
        results, problem = _attempt("cudaStreamEndCapture", stream.handle)
        if problem is not None:
            _forget()
        elif done:
            (captured,) = results
        else:
            _call("cudaGraphDestroy", *results)
    if captured is None:
        return None
    try:
        return CudaGraph(captured)
    except EngineError:
        _forget()
        return None
    finally:
        _call("cudaGraphDestroy", captured)


def copy_to_device(address: int, array: NDArray[Any], stream: Stream) -> None:
    """Enqueue a copy of a contiguous ``array``, which must not change until the copy is done."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    _call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream.handle)


def copy_to_host(array: NDArray[Any], address: int, stream: Stream) -> None:
    """Enqueue a copy into a contiguous ``array``, which holds the content once the copy is done."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    _call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream.handle)


def copy_on_device(target: int, source: int, size: int, stream: Stream) -> None:
    """Enqueue a copy of ``size`` bytes from address to address."""
    kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    _call("cudaMemcpyAsync", target, source, size, kind, stream.handle)


def _runtime() -> Any:
    return import_module("cuda.bindings.runtime")


def _call(name: str, *arguments: Any, kind: type[QieError] = EngineError) -> Any:
    """The result of a call: None, a value, or a list of values."""
    results, problem = _attempt(name, *arguments)
    if problem is not None:
        raise kind(_sentence(name, problem))
    if len(results) == 1:
        return results[0]
    return results or None


def _attempt(name: str, *arguments: Any) -> tuple[list[Any], str | None]:
    """The results of a call, and the name of its error."""
    try:
        code, *results = getattr(_runtime(), name)(*arguments)
    except RuntimeError as failure:  # of the bindings: a library that does not load, a function that it lacks
        return [], first_line(failure)
    problem = None if code == _runtime().cudaError_t.cudaSuccess else str(code.name)
    return results, problem


def _forget() -> None:
    """Clear the error that CUDA keeps of a call that was allowed to fail."""
    _attempt("cudaGetLastError")


def _sentence(name: str, problem: str) -> str:
    if problem in ("cudaErrorNoDevice", "cudaErrorInsufficientDriver"):
        return f"CUDA finds no usable GPU ({problem} from {name}); check what `qie doctor` reports on GPUs and driver"
    return f"the GPU failed ({problem} from {name}); try again, and check `nvidia-smi` if it fails again"
