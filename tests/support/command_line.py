"""The command line in tests: what its fixtures are called with, and options of a short edit."""

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["RUN", "Qie", "Refusal", "assert_says", "opened", "pixels"]

Qie = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]

RUN = ("--steps", "2", "--cfg", "1")


def assert_says(message: str, pattern: str) -> None:
    """Search ``pattern`` in ``message``, and show the message where it is not found."""
    assert re.search(pattern, message), message


def opened(path: str | Path) -> Image.Image:
    """The image in a file that may be overwritten."""
    with Image.open(path) as image:
        return image.copy()


def pixels(path: str | Path) -> NDArray[np.uint8]:
    return np.asarray(opened(path))
