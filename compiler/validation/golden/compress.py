"""Arrays that repeat themselves, without loss in a tenth of their bytes: vision patches hold every pixel twice."""

import zlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["packed", "unpacked"]

_MOST = 1 << 30
"""Bytes of an array: 768 images for the published vision tower."""


def packed(array_RX: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An array [R, X], compressed with zlib: uint8 [bytes]."""
    return np.frombuffer(zlib.compress(array_RX.astype("<f4").tobytes(), 9), np.uint8)


def unpacked(compressed: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """The array with ``rows`` rows that ``packed`` compressed.

    Raises:
        ValueError: it is something else.
    """
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(compressed.tobytes(), _MOST)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not reader.eof or reader.unused_data or len(content) % (4 * rows):
        raise ValueError(f"{len(content)} bytes in {rows} rows")
    return np.frombuffer(content, "<f4").reshape(rows, -1)
