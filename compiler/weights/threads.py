"""Work on large arrays in as many threads as the machine has cores: numpy releases Python's lock in its loops."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

__all__ = ["in_threads", "threads"]

LEAST = 1 << 20
"""Elements below which a second thread costs more than it saves."""


def threads() -> int:
    """How many threads work at once: a thread per core that this process may use, and at most OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0))
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores


def in_threads(work: Callable[[int, int], None], count: int, *, elements: int) -> None:
    """Call ``work(start, stop)`` with ranges that together are ``range(count)``, one in each thread.

    Args:
        work: what is called; an exception of it is raised here when no range is worked on any more.
        count: of what is split, such as rows.
        elements: of the whole array, by which the number of threads is chosen.
    """
    number = max(1, min(threads(), count, elements // LEAST))
    bounds = [count * index // number for index in range(number + 1)]
    if number == 1:
        work(0, count)
        return
    pool = ThreadPoolExecutor(number - 1, thread_name_prefix="qie-arrays")
    try:
        others = [pool.submit(work, start, stop) for start, stop in pairwise(bounds[1:])]
        work(bounds[0], bounds[1])
        for other in others:
            other.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
