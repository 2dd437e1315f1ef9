"""The GPU that the sessions of an editor share: one stream, one arena, and the memory of all tensors."""

import math
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qie.engines.bundle.manifest import Specialization
from qie.engines.errors import EngineError, QieError
from qie.engines.machine import choose_gpu, this_machine
from qie.engines.sessions import cuda

__all__ = ["RUNS_AHEAD", "Block", "Device", "DeviceOptions", "DeviceTensor"]

RUNS_AHEAD = 2
"""Runs that may be in flight when the next one is enqueued: enough that the GPU never waits for the host, few enough
that progress is current and an interrupt takes effect soon."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOptions:
    """How the sessions of a device use it.

    Attributes:
        cuda_graphs: capture repeated runs as CUDA graphs. None is where the session captures them itself: TensorRT for
            RTX, which does that behind its API, runs without.
        specialization: kernels of TensorRT for RTX for shapes that vary; see ``Specialization``.
        unloads: engines take turns, so that an engine keeps its contexts and kernels and gives its weights back.
        arena_bytes: activations of the largest run of any engine that will be loaded; 0 where unknown.
    """

    cuda_graphs: bool | None = None
    specialization: Specialization = "none"
    unloads: bool = False
    arena_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """A range of the GPU's memory: its address and its size in bytes."""

    address: int
    size: int


class DeviceTensor:
    """A contiguous tensor in the GPU's memory, which is released with it."""

    __slots__ = ("_device", "address", "dtype", "shape")

    def __init__(self, device: "Device", address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._device = device
        self.address = address
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __del__(self) -> None:
        self._device.release(self.address)


class Device:
    """One GPU with a stream, in which all work is done in order, and an arena for activations.

    One engine runs at a time, so the arena has the size of the largest need, and is reserved once. Released memory is
    freed at the next allocation, because freeing waits for the GPU.

    Attributes:
        gpu: the GPU.
        options: how sessions use it.
        stream: in which all work is done.
        arena: memory for activations; empty before the first run.
        weights_to_come: bytes of engines that will be loaded beside those that are; a session that chooses how much it
            takes leaves them.
    """

    def __init__(
        self, compute_capability: str, options: DeviceOptions | None = None, *, device: int | None = None
    ) -> None:
        """Open a GPU of ``compute_capability``.

        Args:
            compute_capability: of the engines.
            options: how sessions use it.
            device: CUDA index of the GPU; None for the first that fits.

        Raises:
            EngineMismatchError: there is no such GPU.
        """
        self._closed = True
        self.gpu = choose_gpu(this_machine(), compute_capability, device)
        self.options = options or DeviceOptions()
        self._marks: deque[cuda.Event] = deque()
        self._allocated: set[int] = set()
        self._released: list[int] = []
        self._read: list[NDArray[Any]] = []
        self._working = False
        self.arena = Block(0, 0)
        cuda.use(self.gpu.index)
        self.stream = cuda.Stream()
        self._closed = False
        self.weights_to_come = 0
        self._arena_bytes = self.options.arena_bytes
        while len(self._marks) < RUNS_AHEAD:
            self._marks.append(cuda.Event())

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """A tensor with the content of ``array``, which must not change before the next ``synchronize``."""
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        tensor = self.empty(array.shape, array.dtype)
        self._working = True
        self._read.append(contiguous)
        cuda.copy_to_device(tensor.address, contiguous, self.stream)
        return tensor

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceTensor:
        """A tensor without content."""
        self.use()
        self._free_released()
        kind = np.dtype(dtype)
        address = cuda.allocate(max(1, math.prod(shape) * kind.itemsize))
        self._allocated.add(address)
        return DeviceTensor(self, address, shape, kind)

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Enqueue a copy; shapes and dtypes are equal."""
        assert (source.shape, source.dtype) == (target.shape, target.dtype)
        self._working = True
        cuda.copy_on_device(target.address, source.address, source.nbytes, self.stream)

    def download(self, tensor: DeviceTensor) -> NDArray[np.generic]:
        """The content of ``tensor`` after all work so far."""
        self.use()
        array: NDArray[np.generic] = np.empty(tensor.shape, tensor.dtype)
        cuda.copy_to_host(array, tensor.address, self.stream)
        self.synchronize()
        return array

    def queue(self, enqueue: Callable[[], None]) -> None:
        """Call ``enqueue``, which puts a run into the stream, once fewer than ``RUNS_AHEAD`` runs are in flight."""
        mark = self._marks[0]
        mark.wait()
        self._working = True
        enqueue()
        mark.record(self.stream)
        self._marks.rotate(-1)

    def expect(self, size: int) -> None:
        """Let the arena be of at least ``size`` bytes when it is reserved."""
        self._arena_bytes = max(self._arena_bytes, size)

    @property
    def arena_to_come(self) -> int:
        """Bytes by which the arena will grow."""
        return max(self._arena_bytes - self.arena.size, 0)

    def reserve(self, size: int) -> Block:
        """The arena, of at least ``size`` bytes and of all that is expected; growing changes its address.

        Where the GPU has no room for what is expected, the arena has ``size`` bytes.

        Raises:
            EngineError: the GPU is out of memory.
        """
        if size > self.arena.size:
            self.synchronize()
            old, self.arena = self.arena, Block(0, 0)
            if old.size:
                cuda.free(old.address)
            self._free_released()
            expected = max(size, self._arena_bytes)
            try:
                self.arena = Block(cuda.allocate(expected), expected)
            except EngineError:
                if expected == size:
                    raise
                self.arena = Block(cuda.allocate(size), size)
        return self.arena

    def synchronize(self) -> None:
        """Wait until all work is done.

        Raises:
            EngineError: some of it failed.
        """
        self.stream.synchronize()
        self._working = False
        self._read.clear()

    def use(self) -> None:
        """Make this GPU the calling thread's.

        Raises:
            EngineError: it was closed.
        """
        if self._closed:
            raise EngineError("the GPU was closed while it was in use; do not close an editor within its own edit")
        cuda.use(self.gpu.index)

    def release(self, address: int) -> None:
        """Mark the memory at ``address`` as free once all work so far is done; a closed device has freed it."""
        if not self._closed:
            self._released.append(address)

    def close(self) -> None:
        """Free everything, tensors that are still held among it: the frames of an exception hold some.

        Sessions must be closed before, and tensors not used again. Closing twice is allowed.

        Raises:
            EngineError: some of the work failed; everything is freed all the same.
        """
        if self._closed:
            return
        self._closed = True
        self._released.clear()
        with ExitStack() as stack:  # last in, first out; no failure skips what is left
            stack.callback(self.stream.close)
            for mark in self._marks:
                stack.callback(mark.close)
            for address in self._allocated | ({self.arena.address} if self.arena.size else set()):
                stack.callback(cuda.free, address)
            stack.callback(self.synchronize)
            cuda.use(self.gpu.index)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the driver frees everything
            with suppress(QieError):  # there is nobody left to handle a failure of the GPU
                self.close()

    def _free_released(self) -> None:
        if self._released and self._working:
            self.synchronize()
        while self._released:
            cuda.free(self._released[-1])
            self._allocated.discard(self._released.pop())
