"""Rounding of float32 to E4M3 (OCP 8-bit floating point specification) by arithmetic on the bits of float32.

E4M3 has a sign, 4 bits of exponent with bias 7 and 3 of mantissa. Rounding is to nearest, ties to even, and saturates.
The results are those of ml_dtypes, bit for bit, at several times its speed.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST", "encode_e4m3", "round_to_e4m3"]

LARGEST = 448.0

_SIGN = np.uint32(0x8000_0000)
_EXPONENT = np.uint32(0x7F80_0000)

_DROPPED = np.uint32(20)
"""Bits of a mantissa of float32, 23, that E4M3 lacks."""

_REBIASED = np.uint32(0x0007_FFFF - ((127 - 7) << 23) + (1 << 32))
"""Just below half of the last kept bit, and the difference of the biases of exponents, modulo 2^32."""

_SMALLEST_NORMAL = np.uint32((127 - 6) << 23)
"""The bits of 2^-6."""

_NORMAL_RANGE = np.uint32(2 * (0x43E0_0000 - ((127 - 6) << 23)))
"""The difference of the bits of LARGEST and of the smallest normal number, shifted by one to drop a sign."""

_NAN = np.uint8(0x7F)

_SUBNORMALS = np.float32(2.0**14)
"""Added to a smaller magnitude it leaves the number of steps of 2^-9 in the last bits: 2^14 * 2^-23 is a step."""

_ALIGNED = np.uint32(20 << 23)
_THREE_HALVES = np.uint32(1 << 22)


def encode_e4m3(x: NDArray[np.float32], out: NDArray[np.uint8], scratch: NDArray[np.uint32]) -> None:
    """Write the codes of ``x``, one byte each, to ``out``.

    Args:
        x: contiguous; what is beyond LARGEST is limited in place.
        out: of the same shape, contiguous.
        scratch: of the same shape, contiguous.
    """
    np.clip(x, -LARGEST, LARGEST, out=x)
    bits = x.view(np.uint32)
    np.right_shift(bits, _DROPPED, out=scratch)  # round to nearest even at bit 20
    np.bitwise_and(scratch, np.uint32(1), out=scratch)
    np.add(scratch, bits, out=scratch)
    np.add(scratch, _REBIASED, out=scratch)
    np.right_shift(scratch, _DROPPED, out=scratch)
    np.copyto(out, scratch, casting="unsafe")  # keeps exponent and mantissa and drops the sign, which is bit 11
    np.left_shift(bits, np.uint32(1), out=scratch)
    np.subtract(scratch, _SMALLEST_NORMAL << np.uint32(1), out=scratch)
    others = np.flatnonzero(np.greater(scratch, _NORMAL_RANGE))  # small numbers, which wrap around, and NaN
    if others.size:
        magnitudes = np.abs(x.reshape(-1)[others])
        codes = (magnitudes + _SUBNORMALS).view(np.uint32).astype(np.uint8)
        out.reshape(-1)[others] = np.where(np.isnan(magnitudes), _NAN, codes)
    signs = np.signbit(x).view(np.uint8)
    np.subtract(np.uint8(0), signs, out=signs)  # numpy shifts bytes slowly
    np.bitwise_and(signs, np.uint8(0x80), out=signs)
    np.bitwise_or(out, signs, out=out)


def round_to_e4m3(x: NDArray[np.float32], scratch: NDArray[Any]) -> None:
    """Round ``x`` in place to the numbers of E4M3.

    Args:
        x: contiguous; NaN stays NaN.
        scratch: uint32 of the same shape, contiguous.
    """
    np.clip(x, -LARGEST, LARGEST, out=x)
    bits = x.view(np.uint32)
    signs = np.bitwise_and(bits, _SIGN)
    # 1.5 * 2^20 times the power of two of x: adding it leaves 3 bits of mantissa, with either sign of x
    np.bitwise_and(bits, _EXPONENT, out=scratch)
    np.maximum(scratch, _SMALLEST_NORMAL, out=scratch)
    np.add(scratch, _ALIGNED, out=scratch)
    np.bitwise_or(scratch, _THREE_HALVES, out=scratch)
    np.add(x, scratch.view(np.float32), out=x)
    np.subtract(x, scratch.view(np.float32), out=x)
    np.bitwise_or(bits, signs, out=bits)  # of zeros
