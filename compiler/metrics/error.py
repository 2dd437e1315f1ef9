"""Distances between a result and what is expected, computed in float64 with NumPy alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cosine", "pooled_relative_l2", "psnr_db", "relative_l2"]

Array = NDArray[Any]


def psnr_db(image: Array, expected: Array, *, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB: ``10 log10(peak² / mean((image - expected)²))``, over all pixels and channels.

    The same as ``skimage.metrics.peak_signal_noise_ratio`` with ``data_range=peak``.

    Args:
        image: An image of any shape and dtype.
        expected: The image it should be, of the same shape.
        peak: The distance between the smallest and the largest possible value: 255 for uint8, 2 for -1 .. 1.

    Returns:
        Higher is closer; infinite for equal images.
    """
    assert image.shape == expected.shape, (image.shape, expected.shape)
    mean_square = float(np.mean(np.square(image.astype(np.float64) - expected)))
    return 10 * math.log10(peak**2 / mean_square) if mean_square else math.inf


def relative_l2(values: Array, expected: Array) -> float:
    """Relative L2 error: ``‖values - expected‖₂ / ‖expected‖₂`` over all elements.

    Args:
        values: An array of any shape and dtype.
        expected: The array it should be, of the same shape.

    Returns:
        Lower is closer, 0 for equal arrays; infinite where all is expected to be zero and is not, not
        a number where there is nothing to compare.
    """
    return pooled_relative_l2([values], [expected])


def pooled_relative_l2(samples: Sequence[Array], expected: Sequence[Array]) -> float:
    """Relative L2 error of all samples together: ``sqrt(Σᵢ ‖samplesᵢ - expectedᵢ‖² / Σᵢ ‖expectedᵢ‖²)``.

    Args:
        samples: One array a sample; samples may differ in shape.
        expected: The arrays they should be, in the same order and of the same shapes.

    Returns:
        Lower is closer, 0 for equal arrays; infinite where all is expected to be zero and is not, not
        a number where there is nothing to compare.
    """
    error = reference = 0.0
    for sample, exact in zip(samples, expected, strict=True):
        assert sample.shape == exact.shape, (sample.shape, exact.shape)
        error += float(np.square(sample.astype(np.float64) - exact).sum())
        reference += float(np.square(exact.astype(np.float64)).sum())
    if not sum(sample.size for sample in samples):
        return math.nan
    if reference == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / reference)


def cosine(values: Array, expected: Array) -> float:
    """Cosine similarity: ``⟨values, expected⟩ / (‖values‖₂ ‖expected‖₂)`` over all elements.

    Args:
        values: An array of any shape and dtype.
        expected: The array it should be, of the same shape.

    Returns:
        1 for equal directions, -1 for opposite ones; 1 for two arrays of zeros and 0 for one of zeros; not a number for
        empty arrays.
    """
    a, b = values.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not a.size:
        return math.nan
    if norms == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return float(np.clip(a @ b / norms, -1, 1))
