"""The meter of an edit: progress and time of its stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from qie.engines.progress import Progress, StageProgress

__all__ = ["Meter"]


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
    def __call__(self, stage: str) -> Iterator[StageProgress]:
        start = time.perf_counter()
        try:
            yield partial(self._progress, stage)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
