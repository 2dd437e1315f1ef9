"""Progress and time of the stages of an edit."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

__all__ = ["Meter", "Progress", "no_progress"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, units done, units in all)."""


def no_progress(done: int, total: int) -> None:
    """The progress of a stage that nobody watches."""


class Meter:
    """Reports the progress of each stage under its name, and measures its time.

    ``with meter("vision") as progress:`` gives the stage a function that is called with (units done, units in all).

    Attributes:
        seconds: time of each stage so far.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        start = time.perf_counter()
        try:
            yield partial(self._progress, stage)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
