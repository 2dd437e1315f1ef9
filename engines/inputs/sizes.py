"""Image sizes: the buckets of a model's area, and the size that a bundle's engines take for a requested one.

Widths, heights and sides are pixels, areas are square pixels. A token of the transformer covers 16 x 16 pixels (VAE
factor 8, packing 2), so an image of width x height pixels has width * height / 256 tokens.
"""

import math
from collections.abc import Sequence

from qie.engines.bundle.specs import SIDE_MULTIPLE, ShapeLimits, Size
from qie.engines.errors import RequestError

__all__ = [
    "BUCKET_MULTIPLE",
    "calculate_dimensions",
    "fits",
    "nearest_bucket",
    "resolve_size",
]


BUCKET_MULTIPLE = 32
"""The sides of a bucket are multiples of this many pixels (pipeline_qwenimage_edit_plus.py, calculate_dimensions)."""


def calculate_dimensions(area: int, ratio: float) -> Size:
    """The size of about ``area`` square pixels whose width is ``ratio`` times its height.

    Each side is rounded to a multiple of 32 (half to even), as in ``calculate_dimensions`` of diffusers'
    pipeline_qwenimage_edit_plus.py. ``area`` and ``ratio`` are positive.
    """
    width = math.sqrt(area * ratio)
    height = width / ratio
    return Size(
        width=round(width / BUCKET_MULTIPLE) * BUCKET_MULTIPLE,
        height=round(height / BUCKET_MULTIPLE) * BUCKET_MULTIPLE,
    )


def nearest_bucket(buckets: Sequence[Size], width: int, height: int) -> Size:
    """The bucket (of at least one) whose aspect ratio is nearest to width : height, then whose area is.

    Aspect ratios are compared by their logarithms, so that 2:1 and 1:2 are equally far from 1:1. ``width`` and
    ``height`` are positive.
    """
    log_aspect = math.log(width) - math.log(height)
    log_area = math.log(width) + math.log(height)

    def distance(bucket: Size) -> tuple[float, float]:
        return (
            abs(math.log(bucket.width / bucket.height) - log_aspect),
            abs(math.log(bucket.area) - log_area),
        )

    return min(buckets, key=distance)


def fits(limits: ShapeLimits, width: int, height: int) -> bool:
    """Whether the engines take an image of exactly this size."""
    return (
        width % SIDE_MULTIPLE == 0
        and height % SIDE_MULTIPLE == 0
        and limits.min_side <= min(width, height)
        and max(width, height) <= limits.max_side
        and width * height <= limits.max_area
    )


def resolve_size(limits: ShapeLimits, width: int, height: int) -> tuple[Size, str | None]:
    """The size to generate for a requested one, and a sentence for the user where the two differ.

    Sides are rounded down to multiples of 16. A size that is then too small or too large for ``limits`` becomes the
    bucket nearest to the requested size. The sentence names the requested size, the used one and the reason.

    Raises:
        RequestError: a side is zero or negative.
    """
    if width <= 0 or height <= 0:
        raise RequestError(f"the size {width}x{height} has a side that is not positive; use 1024x768", option="size")
    rounded = Size(width=width - width % SIDE_MULTIPLE, height=height - height % SIDE_MULTIPLE)
    if fits(limits, rounded.width, rounded.height):
        if (rounded.width, rounded.height) == (width, height):
            return rounded, None
        return rounded, f"requested {width}x{height}, using {rounded}: sides are multiples of {SIDE_MULTIPLE} pixels"
    bucket = nearest_bucket(limits.buckets, width, height)
    return bucket, f"requested {width}x{height}, using {bucket}, the nearest bucket: {_why_not(limits, rounded)}"


def _why_not(limits: ShapeLimits, size: Size) -> str:
    """The first limit that ``size``, with sides that are multiples of 16, exceeds."""
    if min(size.width, size.height) < limits.min_side:
        return f"this bundle takes sides of at least {limits.min_side} pixels"
    if max(size.width, size.height) > limits.max_side:
        return f"this bundle takes sides of at most {limits.max_side} pixels"
    return f"this bundle takes at most {limits.max_area} pixels in all"
