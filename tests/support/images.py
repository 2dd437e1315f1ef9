"""Images that tests edit, made from a seed."""

import numpy as np
from PIL import Image

__all__ = ["noise_image", "smooth_image"]


def smooth_image(width: int, height: int, seed: int = 0, *, grain: int = 0) -> Image.Image:
    """Smooth colors, which an autoencoder can follow.

    Args:
        width: Pixels.
        height: Pixels.
        seed: Of the colors and the grain.
        grain: Largest difference of a channel from the smooth color, 0 to 255.
    """
    rng = np.random.default_rng(seed)
    colors = Image.fromarray(rng.integers(0, 256, (9, 15, 3), np.uint8))
    smooth = colors.resize((width, height), Image.Resampling.BICUBIC)
    if not grain:
        return smooth
    grainy = np.asarray(smooth, np.int16) + rng.integers(-grain, grain + 1, (height, width, 3))
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Every pixel random, so that no two neighbors, rows or channels can be confused."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
