"""CUDA's error codes and handles: streams, events, graphs."""

import itertools
from collections import deque
from collections.abc import Callable
from enum import IntEnum

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
