"""Where the output of a module is sampled."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLES", "sample_places"]

SAMPLES = 256
"""Most elements of a module's output that are kept."""

_PLASTIC = (0xC13FA9A902A6328F, 0x91E10DA5C79E7B1C)
"""2^64 / p and 2^64 / p^2 of the plastic number p: steps of the R2 sequence, which covers a square evenly (Roberts,
"The Unreasonable Effectiveness of Quasirandom Sequences", 2018)."""


@lru_cache(maxsize=4096)
def sample_places(shape: tuple[int, int], count: int = SAMPLES) -> NDArray[np.int64]:
    """Where an output of ``shape`` (rows, channels) is sampled: int64 [S, 2], a row and a channel each.

    The places are distinct, ascending and evenly spread over rows and channels. They depend on nothing but the
    arguments. S is at most ``count``, and less only where places coincide; an output of at most ``count`` elements
    is sampled everywhere. The array is shared by callers and cannot be written.
    """
    places = _places(shape, count)
    places.flags.writeable = False
    return places


def _places(shape: tuple[int, int], count: int) -> NDArray[np.int64]:
    rows, channels = shape
    if rows * channels <= count:
        return np.indices((rows, channels), np.int64).reshape(2, -1).T.copy()
    places = {
        tuple((number * step % 2**64) * size >> 64 for step, size in zip(_PLASTIC, shape, strict=True))
        for number in range(1, count + 1)
    }
    return np.array(sorted(places), np.int64)
