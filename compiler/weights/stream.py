"""Streams the checkpoint's tensors into the external data of a graph, one tensor at a time."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np
import numpy.typing as npt

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.weight import Layout, Weight
from qie.engines.errors import BuildError, CheckpointError
from qie.engines.files import is_disk_full
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "CHUNK_BYTES",
    "Entry",
    "WeightFile",
    "check_weights",
    "disk_error",
    "prepare",
    "total_bytes",
    "write_weights",
]

_RAW_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""What a checkpoint may store. Integers belong to another quantization, whose scales are unknown."""

_PAGE = 4096
"""Alignment in bytes of a tensor of at least this size: a page, so that a runtime can map it."""

_LINE = 64
"""Alignment in bytes of a smaller tensor: a cache line."""

CHUNK_BYTES = 1 << 26
"""Bytes written between two reports of progress."""

_SHOWN = 5
"""How many problems an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of the file.

    Attributes:
        name: name of the weight.
        offset: where the tensor starts, in bytes.
        length: its size in bytes.
    """

    name: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """A written file of external data.

    Attributes:
        path: the file.
        bytes: its size.
        sha256: sha256 of its content, in hex.
        entries: its tensors in order.
    """

    path: Path
    bytes: int
    sha256: str
    entries: tuple[Entry, ...]

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and length in bytes by name."""
        return {entry.name: (entry.offset, entry.length) for entry in self.entries}


def total_bytes(weights: Sequence[Weight]) -> int:
    """Size in bytes of the file that ``write_weights`` writes for these weights, alignment included."""
    entries = _plan(weights)
    return entries[-1].offset + entries[-1].length if entries else 0


def prepare(weight: Weight, raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One tensor as the graph reads it: cast (round to nearest even), laid out, reshaped; C-contiguous.

    With a quantizer the result is the quantized values of the tensor in float32, or their scales.

    Raises:
        CheckpointError: the tensor has another shape, is not floating-point, or has an element that is not finite in
            the graph's dtype.
    """
    problem = _mismatch(weight, raw.shape, raw.dtype.name)
    if problem:
        raise CheckpointError(f"{problem}; download the checkpoint again")
    quantizer = weight.quantizer
    with np.errstate(over="ignore", invalid="ignore"):
        tensor = raw.astype(np.dtype("float32" if quantizer else weight.dtype), copy=False)
    for step in weight.layout:
        tensor = _STEPS[step](tensor)
    if quantizer is None:
        tensor = np.ascontiguousarray(tensor).reshape(weight.shape)
    if not _is_finite(tensor):
        raise CheckpointError(
            f"{weight.subfolder} tensor {weight.source!r} has infinite or NaN elements in {weight.dtype}, expected "
            "finite ones; download the checkpoint again, or leave out the LoRA that causes it"
        )
    if quantizer is not None:
        scale = quantizer.scale(tensor)
        tensor = np.ascontiguousarray(
            quantizer.quantize(tensor, scale) if weight.scale_of is None else scale.astype(np.dtype(weight.dtype))
        )
    return tensor


def write_weights(
    weights: Sequence[Weight],
    readers: Mapping[Subfolder, TensorReader],
    path: Path,
    *,
    progress: StageProgress = no_progress,
) -> WeightFile:
    """Write all weights into one file, in order and one at a time.

    Names, shapes and dtypes are checked before the first byte is written. The file appears under its name only when it
    is complete.

    Args:
        weights: the weights, with distinct names.
        readers: one for each subfolder of the weights.
        path: the file to write, in an existing folder.
        progress: called with the bytes done and the bytes in all.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating-point or finite.
        BuildError: the disk is full or the file cannot be written.
    """
    check_weights(weights, readers)
    entries, total = _plan(weights), total_bytes(weights)
    assert len({entry.name for entry in entries}) == len(entries), "two weights of one name"
    temporary = path.with_name(f"{path.name}.part")
    sha256 = hashlib.sha256()
    try:
        temporary.unlink(missing_ok=True)
        if total > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = 0
        with temporary.open("wb") as file:
            for chunk in _chunks(weights, entries, readers):
                file.write(chunk)
                sha256.update(chunk)
                done += len(chunk)
                progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(error, path, total) from error
        raise
    return WeightFile(path=path, bytes=total, sha256=sha256.hexdigest(), entries=entries)


def check_weights(weights: Sequence[Weight], readers: Mapping[Subfolder, TensorReader]) -> None:
    """Compare all weights with the names, shapes and dtypes of the checkpoint, without reading a tensor.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating-point.
    """
    problems = _problems(weights, readers)
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"weights do not match the configs: {', '.join(problems[:_SHOWN])}{more}; download the checkpoint again"
        )


def disk_error(error: OSError, path: Path, total: int) -> BuildError:
    """What to raise where ``error`` stopped the writing of ``path``, which needs ``total`` bytes."""
    if is_disk_full(error):
        free = shutil.disk_usage(path.parent).free
        return BuildError(
            f"{path} needs {total:,} bytes, and {free:,} are free ({error.strerror}); make room, or build elsewhere"
        )
    return BuildError(f"{path} cannot be written ({error}); check the folder and its permissions")


def _plan(weights: Sequence[Weight]) -> tuple[Entry, ...]:
    entries = []
    end = 0
    for weight in weights:
        length = _length(weight)
        alignment = _PAGE if length >= _PAGE else _LINE
        offset = -(-end // alignment) * alignment
        entries.append(Entry(name=weight.name, offset=offset, length=length))
        end = offset + length
    return tuple(entries)


def _length(weight: Weight) -> int:
    """Bytes of a weight; two 4-bit values share one."""
    count = math.prod(weight.shape)
    return -(-count // 2) if weight.dtype == "int4" else count * np.dtype(weight.dtype).itemsize


def _content(tensor: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of a prepared tensor; of two 4-bit values the first is the lower half (onnx.proto, TensorProto)."""
    flat = tensor.reshape(-1)
    if tensor.dtype != np.dtype("int4"):
        return flat.view(np.uint8)
    nibbles = flat.astype(np.int8).view(np.uint8) & np.uint8(0xF)
    nibbles = np.pad(nibbles, (0, len(nibbles) % 2))
    return np.asarray(nibbles[::2] | (nibbles[1::2] << np.uint8(4)), np.uint8)


def _chunks(
    weights: Sequence[Weight], entries: Sequence[Entry], readers: Mapping[Subfolder, TensorReader]
) -> Iterator[bytes | memoryview]:
    """The file's bytes in order: padding, then a tensor, at most CHUNK_BYTES at a time."""
    end = 0
    last, raw = "", None
    for weight, entry in zip(weights, entries, strict=True):
        yield bytes(entry.offset - end)
        if weight.source != last:  # quantized values and scales of a tensor are neighbors
            last, raw = weight.source, readers[weight.subfolder].read(weight.source)
        assert raw is not None
        content = _content(prepare(weight, raw)).data
        for start in range(0, entry.length, CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]
        end = entry.offset + entry.length


def _problems(weights: Sequence[Weight], readers: Mapping[Subfolder, TensorReader]) -> list[str]:
    names = {subfolder: frozenset(reader.names()) for subfolder, reader in readers.items()}
    problems = []
    for weight in weights:
        reader = readers[weight.subfolder]
        if weight.source not in names[weight.subfolder]:
            problems.append(f"{weight.subfolder} tensor {weight.source!r} is missing")
        elif problem := _mismatch(weight, reader.shape(weight.source), reader.dtype(weight.source)):
            problems.append(problem)
    return problems


def _mismatch(weight: Weight, shape: tuple[int, ...], dtype: str) -> str | None:
    """Why a tensor cannot be this weight, or None."""
    tensor = f"{weight.subfolder} tensor {weight.source!r}"
    if dtype not in _RAW_DTYPES:
        return f"{tensor} is {dtype}, expected one of {', '.join(_RAW_DTYPES)}"
    laid_out = _laid_out(weight, shape)
    if weight.scale_of is not None and weight.quantizer is not None and laid_out is not None:
        laid_out = weight.quantizer.scale_shape(laid_out)
    if laid_out is None or not _is_reshape(laid_out, weight.shape):
        way = f" after {', '.join(weight.layout)}" if weight.layout else ""
        return f"{tensor} has shape {list(shape)}, expected {list(weight.shape)}{way}"
    return None


def _laid_out(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a tensor of raw ``shape`` after the layout, or None where a step does not apply."""
    for step in weight.layout:
        match step, shape:
            case "last_frame", (out, inner, frames, height, width) if frames > 0:
                shape = (out, inner, height, width)
            case "flatten", (out, *rest):
                shape = (out, math.prod(rest))
            case "transpose", (out, inner):
                shape = (inner, out)
            case _:
                return None
    return shape


def _is_reshape(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one shape is the other with axes split or merged. An equal number of elements is not enough, because a
    transposed matrix has it too. Compared are the cumulative products:

        [4, 6]     4, 24
        [4, 2, 3]  4, 8, 24    contains those of [4, 6]: a split
        [6, 4]     6, 24       neither contains the other: a transposition
    """
    products, other_products = set(accumulate(shape, mul)) - {1}, set(accumulate(other, mul)) - {1}
    return math.prod(shape) == math.prod(other) and (products <= other_products or other_products <= products)


_STEPS: dict[Layout, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    "last_frame": lambda tensor: tensor[:, :, -1],
    "flatten": lambda tensor: tensor.reshape(len(tensor), -1),
    "transpose": lambda tensor: tensor.T,
}


def _is_finite(tensor: npt.NDArray[Any]) -> bool:
    """Whether all elements are finite; a chunk at a time, because np.isfinite allocates one byte per element."""
    flat = tensor.reshape(-1)
    return all(np.isfinite(flat[start : start + CHUNK_BYTES]).all() for start in range(0, flat.size, CHUNK_BYTES))
