"""The GPU that the sessions of an editor share: one stream, one arena, and the memory of all tensors."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qie.engines.machine import choose_gpu, this_machine
from qie.engines.sessions import cuda

__all__ = ["RUNS_AHEAD", "Block", "Device", "DeviceTensor"]

RUNS_AHEAD = 2
"""Runs that may be in flight when the next one is enqueued: enough that the GPU never waits for the host, few enough
that progress is current and an interrupt takes effect soon."""


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

    One engine runs at a time, so the arena has the size of the largest need. Released memory is freed at the next
    allocation, because freeing waits for the GPU.
    """

    def __init__(self, compute_capability: str, *, device: int | None = None, cuda_graphs: bool = True) -> None:
        """Open a GPU of ``compute_capability``.

        Args:
            compute_capability: of the engines.
            device: CUDA index of the GPU; None for the first that fits.
            cuda_graphs: allows sessions to capture repeated runs as CUDA graphs.

        Raises:
            EngineMismatchError: there is no such GPU.
        """
        self.gpu = choose_gpu(this_machine(), compute_capability, device)
        self.cuda_graphs = cuda_graphs
        cuda.use(self.gpu.index)
        self.stream = cuda.Stream()
        self.arena = Block(0, 0)
        self._marks = deque(cuda.Event() for _ in range(RUNS_AHEAD))
        self._released: list[int] = []
        self._read: list[NDArray[Any]] = []
        self._working = False

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

    def reserve(self, size: int) -> Block:
        """The arena, grown to at least ``size`` bytes; growing changes its address.

        Raises:
            EngineError: the GPU is out of memory.
        """
        if size > self.arena.size:
            self.synchronize()
            old, self.arena = self.arena, Block(0, 0)
            if old.size:
                cuda.free(old.address)
            self._free_released()
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
        """Make this GPU the calling thread's."""
        cuda.use(self.gpu.index)

    def release(self, address: int) -> None:
        """Mark the memory at ``address`` as free once all work so far is done."""
        self._released.append(address)

    def close(self) -> None:
        """Free everything. Sessions must be closed before, and tensors not used again."""
        self.use()
        self.synchronize()
        self._free_released()
        if self.arena.size:
            cuda.free(self.arena.address)
        for mark in self._marks:
            mark.close()
        self.stream.close()

    def _free_released(self) -> None:
        if self._released and self._working:
            self.synchronize()
        while self._released:
            cuda.free(self._released.pop())
