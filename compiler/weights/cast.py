"""Casts and transposes large arrays in blocks that fit the cache of a core, in a thread per core.

The results are those of ``astype`` and of ``ascontiguousarray(matrix.T)``, bit for bit.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.weights.magnitude import BLOCK
from qie.compiler.weights.threads import in_threads

__all__ = ["cast", "transposed"]

_ROWS = 512
_ROW_BYTES = 32
"""A tile of a transposition, of the result: the fastest that was measured, of one, two and four bytes an element."""

_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_INFINITY = {"bfloat16": 0x7F80, "float32": 0x7F80_0000}
"""The bits of infinity. NaN is above."""

_ROUNDED_TO_INFINITY = 0x7F7F_8000
"""The bits of the smallest float32 that becomes infinity in bfloat16."""


def cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Floats [elements] in bfloat16 or float32, rounded to nearest even; None where one is not finite.

    Where they are of that dtype, ``values`` itself is returned.
    """
    same, narrowing = values.dtype == dtype, values.dtype == np.float32 and dtype.name == "bfloat16"
    out = values if same else np.empty(values.shape, dtype)
    checked, limit = (values, _ROUNDED_TO_INFINITY) if narrowing else (out, _INFINITY[dtype.name])
    unsigned = _UNSIGNED[checked.itemsize]
    mask = unsigned((1 << (8 * checked.itemsize - 1)) - 1)
    problems: list[int] = []

    def work(start: int, stop: int) -> None:
        scratch = np.empty(min(BLOCK, stop - start), unsigned)
        for first in range(start, stop, BLOCK):
            block = slice(first, min(first + BLOCK, stop))
            part = scratch[: block.stop - first]
            if not same and not narrowing:
                with np.errstate(over="ignore", invalid="ignore"):
                    out[block] = values[block]
            if np.bitwise_and(checked[block].view(unsigned), mask, out=part).max() >= limit:
                problems.append(first)
                return
            if narrowing:
                _narrow(values[block].view(np.uint32), out[block].view(np.uint16), part)

    if values.size:
        in_threads(work, values.size, elements=values.size)
    return None if problems else out


def _narrow(bits: NDArray[np.uint32], out: NDArray[np.uint16], scratch: NDArray[Any]) -> None:
    """The upper halves of float32 numbers, rounded to nearest even: their bfloat16."""
    np.right_shift(bits, np.uint32(16), out=scratch)
    np.bitwise_and(scratch, np.uint32(1), out=scratch)
    np.add(scratch, bits, out=scratch)
    np.add(scratch, np.uint32(0x7FFF), out=scratch)
    np.right_shift(scratch, np.uint32(16), out=scratch)
    np.copyto(out, scratch, casting="unsafe")


def transposed(matrix: NDArray[Any]) -> NDArray[Any]:
    """The transpose of ``matrix`` [rows, columns], whose rows are contiguous, in memory of its own."""
    unsigned = _UNSIGNED[matrix.itemsize]
    source, result = matrix.view(unsigned), np.empty(matrix.shape[::-1], matrix.dtype)
    out, width = result.view(unsigned), _ROW_BYTES // matrix.itemsize

    def work(start: int, stop: int) -> None:
        for row in range(start, stop, _ROWS):
            rows = slice(row, min(row + _ROWS, stop))
            for column in range(0, len(source), width):
                out[rows, column : column + width] = source[column : column + width, rows].T

    in_threads(work, len(out), elements=matrix.size)
    return result
