"""Prepares one tensor of a checkpoint as a graph reads it: laid out, and cast or quantized."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np
import numpy.typing as npt

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.cast import cast, transposed
from qie.compiler.weights.weight import Layout, Weight
from qie.engines.errors import CheckpointError

__all__ = ["check_weights", "pieces", "prepare"]

_RAW_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""What a checkpoint may store. Integers belong to another quantization, whose scales are unknown."""

_SHOWN = 5
"""How many problems an error lists."""

Array = npt.NDArray[Any]


def prepare(weight: Weight, raw: Array) -> Array:
    """One tensor as the graph reads it: cast (round to nearest even), laid out, reshaped; C-contiguous.

    With a quantizer the result is the quantized values of the tensor in float32, or their scales. Where nothing has to
    be done, it is ``raw`` itself.

    Raises:
        CheckpointError: the tensor has another shape, is not floating-point, or has an element that is not finite in
            the graph's dtype.
    """
    for block in _blocks(weight, raw, sys.maxsize, {}):
        return block.reshape(weight.shape)
    return np.empty(weight.shape, np.dtype(weight.dtype))


def pieces(
    weight: Weight, raw: Array, *, most: int, amax: dict[Any, Array] | None = None
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of the prepared tensor in order; two 4-bit values share one.

    Args:
        weight: what to make of the tensor.
        raw: the tensor as the checkpoint has it.
        most: bytes of a piece, about: at least one row.
        amax: keeps the largest magnitudes of ``raw`` for another weight that is made of it.

    Raises:
        CheckpointError: as in ``prepare``; some pieces may have come before.
    """
    for block in _blocks(weight, raw, most, {} if amax is None else amax):
        flat = block.reshape(-1)
        yield _packed(flat.view(np.uint8)) if weight.dtype == "int4" else flat.view(np.uint8)


def _blocks(weight: Weight, raw: Array, most: int, known: dict[Any, Array]) -> Iterator[Array]:
    """The elements of the prepared tensor in order, as contiguous arrays of about ``most`` bytes."""
    problem = _mismatch(weight, raw.shape, raw.dtype.name)
    if problem:
        raise CheckpointError(f"{problem}; download the checkpoint again")
    tensor = raw
    for step in weight.layout:
        tensor = _STEPS[step](tensor)
    if weight.quantizer is not None:
        tensor = _quantized(weight, tensor, known)
    is_matrix = tensor.ndim == 2 and tensor.flags.f_contiguous and not tensor.flags.c_contiguous
    itemsize = np.dtype(weight.dtype).itemsize
    if is_matrix:
        rows = _even(most // (max(itemsize, tensor.itemsize) * max(1, tensor.shape[1])))
        blocks = (transposed(tensor.T[:, start : start + rows]) for start in range(0, len(tensor), rows))
    else:
        flat = np.ascontiguousarray(tensor).reshape(-1)
        size = _even(most // itemsize)
        blocks = (flat[start : start + size] for start in range(0, flat.size, size))
    for block in blocks:
        if weight.quantizer is not None:
            yield block
            continue
        cast_block = cast(block.reshape(-1), np.dtype(weight.dtype))
        if cast_block is None:
            raise _not_finite(weight)
        yield cast_block


def _quantized(weight: Weight, tensor: Array, known: dict[Any, Array]) -> Array:
    """The quantized values of a laid-out tensor, or their scales."""
    assert weight.quantizer is not None
    with np.errstate(over="ignore", invalid="ignore"):
        if tensor.dtype.name not in ("float32", "bfloat16", "float16"):
            tensor = tensor.astype(np.float32)
        key = (weight.quantizer, weight.layout)
        if key not in known:
            known[key] = weight.quantizer.amax(tensor)
        if not np.isfinite(known[key]).all():
            raise _not_finite(weight)
        scale = weight.quantizer.scale_from_amax(known[key])
    if weight.scale_of is not None:
        return np.ascontiguousarray(scale.astype(np.dtype(weight.dtype)))
    return weight.quantizer.quantize(tensor, scale)


def _not_finite(weight: Weight) -> CheckpointError:
    return CheckpointError(
        f"{weight.subfolder} tensor {weight.source!r} has infinite or NaN elements in {weight.dtype}, expected "
        "finite ones; download the checkpoint again, or leave out the LoRA that causes it"
    )


def _even(count: int) -> int:
    """About ``count``: whole tiles of a transposition, and pairs of 4-bit values."""
    return count - count % 1024 if count >= 1024 else max(2, count - count % 2)


def _packed(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two 4-bit values in a byte: the first is the lower half (onnx.proto, TensorProto)."""
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    pairs = nibbles.view("<u2") & np.uint16(0x0F0F)
    return np.asarray(pairs | (pairs >> np.uint16(4))).astype(np.uint8)


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
