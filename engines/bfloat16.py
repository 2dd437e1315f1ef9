"""bfloat16 without a package for it: numpy has no such type, so values are float32 and stored values are their bits.

bfloat16 is the upper half of a float32, so widening is exact and narrowing rounds to nearest, ties to even.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["narrow", "round_to_bfloat16", "widen"]


def widen(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Convert bfloat16 bits (uint16) or float32 to float32."""
    if stored.dtype == np.uint16:
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.asarray(stored, dtype=np.float32)


def narrow(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16 bits."""
    return (_rounded_bits(x) >> 16).astype(np.uint16)


def round_to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round finite float32 to the nearest bfloat16, as float32."""
    return (_rounded_bits(x) & 0xFFFF0000).view(np.float32)


def _rounded_bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Bits of ``x`` whose upper half is rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    return bits + 0x7FFF + ((bits >> 16) & 1)
