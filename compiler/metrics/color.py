"""Differences of color that people see: CIEDE2000, and where an edit leaves its input alone."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIKE", "FEWEST", "SMOOTHING", "mean_delta_e", "untouched"]

ALIKE = 3.0
"""CIEDE2000 of smoothed pixels up to which an edit has left them alone."""

SMOOTHING = 2.0
"""Sigma in pixels of the Gaussian that takes the detail away which an autoencoder does not return."""

FEWEST = 0.05
"""Fraction of the pixels that must be left alone for their mean color to say something."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def mean_delta_e(image: Pixels, expected: Pixels, mask: Mask | None = None) -> float:
    """Mean CIEDE2000 between two images (``skimage.color.deltaE_ciede2000``, white of D65).

    Args:
        image: An image, uint8 [height, width, 3], sRGB.
        expected: The image it should be, of the same shape.
        mask: bool [height, width], at least one true; None for all pixels.

    Returns:
        Lower is closer, 0 for equal images; about 1 is the least that people notice side by side.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab

    assert image.shape == expected.shape, (image.shape, expected.shape)
    one, other = (image, expected) if mask is None else (image[mask][None], expected[mask][None])
    assert one.size, "the mask is empty"
    return float(np.mean(deltaE_ciede2000(rgb2lab(other), rgb2lab(one))))


def untouched(source: Pixels, edit: Pixels) -> Mask | None:
    """The pixels that ``edit`` leaves as ``source`` has them, apart from fine detail.

    Args:
        source: The input image at the size of the edit, uint8 [height, width, 3], sRGB.
        edit: The edit, of the same shape.

    Returns:
        bool [height, width]: the smoothed images differ by at most ``ALIKE``. None where these are fewer than
        ``FEWEST`` of all pixels.
    """
    from skimage.color import deltaE_ciede2000, rgb2lab
    from skimage.filters import gaussian

    assert source.shape == edit.shape, (source.shape, edit.shape)
    one, other = (rgb2lab(gaussian(array / 255.0, SMOOTHING, channel_axis=2)) for array in (source, edit))
    mask: Mask = deltaE_ciede2000(one, other) <= ALIKE
    return mask if mask.mean() >= FEWEST else None
