"""Largest magnitudes by the bits of floats: without their signs, floats of a format are ordered as their bits are."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.weights.threads import in_threads

__all__ = ["BLOCK", "largest_in_columns", "largest_in_rows", "magnitude"]

BLOCK = 3 << 14
"""Elements worked on at a time, so that all arrays of a step fit the cache of a core."""

_UNSIGNED: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "bfloat16": (np.uint16, 0x7FFF),
    "float16": (np.uint16, 0x7FFF),
    "float32": (np.uint32, 0x7FFF_FFFF),
}


def magnitude(array: NDArray[Any]) -> NDArray[Any]:
    """The bits of the largest magnitude of a contiguous bfloat16, float16 or float32 array, as a scalar array.

    It is of the dtype of ``array``: NaN is above infinity, and an empty array has 0.
    """
    unsigned, mask = _UNSIGNED[array.dtype.name]
    bits, found = array.reshape(-1).view(unsigned), [unsigned(0)]

    def work(start: int, stop: int) -> None:
        scratch = np.empty(min(BLOCK, stop - start), unsigned)
        for first in range(start, stop, BLOCK):
            block = bits[first : min(first + BLOCK, stop)]
            found.append(np.bitwise_and(block, unsigned(mask), out=scratch[: block.size]).max())

    if bits.size:
        in_threads(work, bits.size, elements=bits.size)
    return np.asarray(max(found)).view(array.dtype)


def largest_in_rows(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """The largest magnitude of each row of a matrix [rows, columns] of bfloat16, float16 or float32, as float32."""
    unsigned, mask = _UNSIGNED[matrix.dtype.name]
    bits, found = matrix.view(unsigned), np.zeros(len(matrix), unsigned)

    def work(start: int, stop: int) -> None:
        rows = max(1, BLOCK // bits.shape[1])
        scratch = np.empty((rows, bits.shape[1]), unsigned)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            np.bitwise_and(bits[first:last], unsigned(mask), out=scratch[: last - first]).max(1, out=found[first:last])

    if matrix.size:
        in_threads(work, len(bits), elements=bits.size)
    return np.asarray(found.view(matrix.dtype), np.float32)


def largest_in_columns(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """As ``largest_in_rows``, for each column."""
    unsigned, mask = _UNSIGNED[matrix.dtype.name]
    bits, found = matrix.view(unsigned), np.zeros(matrix.shape[1], unsigned)

    def work(start: int, stop: int) -> None:
        rows = max(1, BLOCK // (stop - start))
        scratch = np.empty((rows, stop - start), unsigned)
        for first in range(0, len(bits), rows):
            block = bits[first : first + rows, start:stop]
            part = np.bitwise_and(block, unsigned(mask), out=scratch[: len(block)]).max(0)
            np.maximum(found[start:stop], part, out=found[start:stop])

    if matrix.size:
        in_threads(work, bits.shape[1], elements=bits.size)
    return np.asarray(found.view(matrix.dtype), np.float32)
