"""The memory and the streams of a fake GPU."""

import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.fake_gpu.handles import OK, Code, Misuse, Stream

VERSION = "1.7.1"
GARBAGE = 0xCD
ALIGNMENT = 256


@dataclass
class Device:
    """The memory and the streams of one fake GPU. ``log`` has every call of weight: (name, detail).

    ``crashes`` has what would end the process; with ``aborts`` it does.
    """

    capability: str = "8.9"
    memory_bytes: int = 1 << 34
    driver: str = "580.95.05"
    cuda: str = "13.0"
    version: str = VERSION
    capturable: bool = True
    fingerprintless: bool = False
    old_driver: bool = False
    aborts: bool = False
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
        self.crashes: list[str] = []
        self.engines: list[weakref.ref[Any]] = []
        self.contexts: list[weakref.ref[Any]] = []
        self._next = 0x7F0000000000

    def crash(self, text: str) -> None:
        """What a destructor cannot raise and a real library does not survive."""
        self.crashes.append(text)
        if self.aborts:
            sys.stderr.write(f"crash: {text}\n")
            sys.stderr.flush()
            os.abort()

    def misuse(self, text: str) -> None:
        raise Misuse(text)

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
        stream = self.streams.get(int(handle))
        if stream is None or not stream.alive:
            raise Misuse(f"{int(handle):#x} is no stream")
        return stream

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
