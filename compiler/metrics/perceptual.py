"""LPIPS, a learned distance of images (Zhang et al. 2018), by the package ``lpips`` where that is installed.

It needs torch, so it is imported by name when it is first used, as the reference is.
"""

import importlib
import warnings
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.errors import BackendMissingError, first_line

__all__ = ["SMALLEST", "lpips"]

SMALLEST = 31
"""Least side in pixels: of less, AlexNet's pooling leaves nothing."""

NET = "alex"
"""The network whose weights lpips recommends for comparing images."""


def lpips(image: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """LPIPS 0.1 with AlexNet. The first call loads the network, whose weights lpips may download.

    Args:
        image: An image, uint8 [height, width, 3], sRGB, each side at least ``SMALLEST``.
        expected: The image it should be, of the same shape.

    Returns:
        Lower is closer, 0 for equal images.

    Raises:
        BackendMissingError: lpips or torch is not installed, or the weights of the network cannot be had.
    """
    assert image.shape == expected.shape, (image.shape, expected.shape)
    assert min(image.shape[:2]) >= SMALLEST, image.shape
    network, torch = _network(), _import("torch")
    one, other = (_tensor_1CHW(torch, array) for array in (image, expected))
    with torch.inference_mode():
        return float(network(one, other, normalize=True).reshape(()))


@cache
def _network() -> Any:
    package = _import("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about an argument that lpips gives it
        try:
            return package.LPIPS(net=NET, verbose=False)
        except Exception as problem:  # of the network, the disk, or torch
            raise BackendMissingError(
                f"the weights that LPIPS needs cannot be loaded ({first_line(problem)}); run "
                f"`python -c 'import lpips; lpips.LPIPS(net=\"{NET}\")'` once where this machine is online"
            ) from problem


def _tensor_1CHW(torch: Any, image_HWC: NDArray[np.uint8]) -> Any:
    """An image as float32 [1, 3, height, width] in 0 .. 1."""
    scaled_HWC = image_HWC.astype(np.float32) / 255
    return torch.from_numpy(np.ascontiguousarray(scaled_HWC.transpose(2, 0, 1))[None])


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as problem:  # also what an extension raises that is built for another torch
        raise BackendMissingError(
            f"{name} cannot be imported ({first_line(problem)}), which LPIPS needs; run `pip install lpips`"
        ) from problem
