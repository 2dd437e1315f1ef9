"""Images at the sizes that a pipeline takes.

Shape suffixes: H W C height, width and the 3 channels of an image, uint8 in 0 .. 255, sRGB.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.specs import Areas, Size
from qie.engines.errors import ImageError
from qie.engines.inputs.sizes import calculate_dimensions

__all__ = ["Prepared", "output_size", "prepare", "resize", "to_uint8_HWC"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The two copies of one image.

    Attributes:
        vision: mode RGB, for ``vision.vision_inputs``.
        vae: uint8 [H, W, 3], for the VAE encoder.
    """

    vision: Image.Image
    vae: NDArray[np.uint8]


def output_size(image_size: tuple[int, int], area: int) -> tuple[int, int]:
    """(width, height) of about ``area`` square pixels at the aspect of ``image_size`` (width, height); multiples of 32.

    For the last image of an edit and the model's ``vae_area``, this is the default size of the result (diffusers
    pipeline_qwenimage_edit_plus.py, ``__call__``; its further rounding to multiples of 16 changes nothing).

    Raises:
        ImageError: a side would be rounded to 0.
    """
    size = calculate_dimensions(area, image_size[0] / image_size[1])
    if not (size.width and size.height):
        raise ImageError(
            f"an image of {image_size[0]} x {image_size[1]} pixels is too narrow for this model, which resizes images "
            f"to {area} square pixels; crop it"
        )
    return size.width, size.height


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at another size in pixels, by Lanczos (diffusers image_processor.py, ``VaeImageProcessor.resize``)."""
    return image.resize((width, height), resample=Image.Resampling.LANCZOS)


def to_uint8_HWC(image: Image.Image) -> NDArray[np.uint8]:
    """An image of mode RGB as its own array: uint8 [H, W, 3]."""
    return np.array(image, dtype=np.uint8)


def prepare(image: Image.Image, areas: Areas, *, size: Size | None = None) -> Prepared:
    """The vision tower's and the VAE's copy of an image, as the model's pipeline makes them.

    Edit-Plus resizes the original twice; Edit uses one copy for both.

    Args:
        image: mode RGB.
        areas: of the copies in square pixels.
        size: of the VAE's copy; None for its area at the aspect of the image.

    Raises:
        ImageError: the image is too narrow for an area.
    """
    vae = resize(image, *(output_size(image.size, areas.vae_area) if size is None else (size.width, size.height)))
    vision = vae
    if areas.condition_area is not None:
        vision = resize(image, *output_size(image.size, areas.condition_area))
    return Prepared(vision=vision, vae=to_uint8_HWC(vae))
