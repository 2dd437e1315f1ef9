"""Structural similarity of two images (Wang et al. 2004, Image Quality Assessment)."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["WINDOW", "ssim"]

SIGMA = 1.5
"""Of the Gaussian window in pixels (Wang et al. 2004)."""

WINDOW = 11
"""Side of the window in pixels: scikit-image cuts the Gaussian at 3.5 sigma."""


def ssim(image: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Mean structural similarity over all pixels and channels, with the constants of Wang et al. 2004.

    An image with a side below ``WINDOW`` is continued beyond its edges by its mirror image, as the other one is.

    Args:
        image: An image, uint8 [height, width, 3], sRGB.
        expected: The image it should be, of the same shape.

    Returns:
        Higher is closer; 1 for equal images, -1 at least.
    """
    from skimage.metrics import structural_similarity

    assert image.shape == expected.shape, (image.shape, expected.shape)
    height, width, _ = image.shape
    missing = [(0, max(WINDOW - side, 0)) for side in (height, width)]
    one, other = (np.pad(array, (*missing, (0, 0)), mode="symmetric") for array in (image, expected))
    return float(
        structural_similarity(
            one,
            other,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=SIGMA,
            use_sample_covariance=False,
        )
    )
