"""Streams the tensors of a checkpoint to what is made of them, in one pass over its files.

Reading, converting and writing overlap: a thread reads the next tensor while one is converted, and the files that are
written have threads of their own.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.consumer import Consumer
from qie.compiler.weights.prepare import check_weights
from qie.compiler.weights.weight import Weight
from qie.compiler.weights.weights_file import WeightFile, WeightsFile
from qie.engines.progress import StageProgress, no_progress

__all__ = ["stream", "write_weights"]

AHEAD_BYTES = 1 << 28
"""Bytes that are read ahead; a larger tensor is read ahead alone."""

AHEAD_TENSORS = 8
"""Tensors that are read ahead at most."""

Place = tuple[Subfolder, str]
"""A tensor: its subfolder and its name."""


def stream(
    consumers: Sequence[Consumer],
    readers: Mapping[Subfolder, TensorReader],
    subfolder: Subfolder | None = None,
    *,
    first: Sequence[str] = (),
    progress: StageProgress = no_progress,
) -> Iterator[Consumer]:
    """Read every tensor that ``consumers`` want once, in the order of the files, and give it to all that want it.

    A consumer that holds a file is closed by its owner, as in ``with WeightsFile(…) as file``: where this raises, or
    is not read to its end, consumers are left unfinished.

    Args:
        consumers: what takes the tensors.
        readers: one for each subfolder.
        subfolder: the only subfolder that the consumers want tensors of; None where there may be several, which are
            read one after another.
        first: names of tensors that come before the others.
        progress: called with the bytes of tensors taken and the bytes in all.

    Yields:
        Each consumer once it has taken all that it wants and is finished.

    Raises:
        CheckpointError: a tensor is missing or cannot be read.
        QieError: a consumer failed.
    """
    wanted: dict[Place, list[int]] = {}
    left = [set(consumer.sources) for consumer in consumers]
    for number, consumer in enumerate(consumers):
        for place in dict.fromkeys(consumer.sources):
            assert subfolder in (None, place[0]), f"{place} is not of {subfolder}"
            wanted.setdefault(place, []).append(number)
        if not left[number]:
            consumer.finish()
            yield consumer
    places = [
        (each, name)
        for each in dict.fromkeys(place[0] for place in wanted)
        for name in _ordered(readers[each], [name for other, name in wanted if other == each], first)
    ]
    sizes = [_bytes(readers[each], name) for each, name in places]
    done, total, number = 0, sum(sizes), 0
    progress(done, total)
    with closing(_read_ahead(readers, places, sizes)) as tensors:
        for tensor in tensors:
            place = places[number]
            for index in wanted[place]:
                consumers[index].take(*place, tensor)
            del tensor  # before the next one is waited for
            done += sizes[number]
            number += 1
            progress(done, total)
            for index in wanted[place]:
                left[index].discard(place)
                if not left[index]:
                    consumers[index].finish()
                    yield consumers[index]


def write_weights(
    weights: Sequence[Weight],
    readers: Mapping[Subfolder, TensorReader],
    path: Path,
    *,
    progress: StageProgress = no_progress,
) -> WeightFile:
    """Write all weights into one file, one tensor at a time in the order of the checkpoint's files.

    Names, shapes and dtypes are checked before the first byte is written. The file appears under its name only when it
    is complete.

    Args:
        weights: the weights in the order of the file, with distinct names.
        readers: one for each subfolder of the weights.
        path: the file to write, in an existing folder.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating-point or finite.
        BuildError: the disk is full or the file cannot be written.
    """
    check_weights(weights, readers)
    with WeightsFile(weights, path, progress=progress) as file:
        for _ in stream([file], readers):
            pass
        return file.written


def _ordered(reader: TensorReader, names: Sequence[str], first: Sequence[str]) -> tuple[str, ...]:
    leading = [name for name in first if name in frozenset(names)]
    return (*leading, *reader.order([name for name in names if name not in leading]))


def _bytes(reader: TensorReader, name: str) -> int:
    return math.prod(reader.shape(name)) * np.dtype(reader.dtype(name)).itemsize


def _read_ahead(
    readers: Mapping[Subfolder, TensorReader], places: Sequence[Place], sizes: Sequence[int]
) -> Generator[NDArray[Any], None, None]:
    """The tensors at ``places``, which a thread reads while earlier ones are used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="qie-read")
    pending: deque[tuple[int, Future[NDArray[Any]]]] = deque()
    waiting = deque(zip(places, sizes, strict=True))
    try:
        while waiting or pending:
            tensor = pending.popleft()[1].result() if pending else None
            ahead = sum(size for size, _ in pending)
            while waiting and (not pending or (ahead + waiting[0][1] <= AHEAD_BYTES and len(pending) < AHEAD_TENSORS)):
                (each, name), size = waiting.popleft()
                pending.append((size, pool.submit(readers[each].read, name)))
                ahead += size
            if tensor is not None:
                yield tensor
            del tensor
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
