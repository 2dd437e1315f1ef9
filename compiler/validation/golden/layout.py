"""Whether the tensors of a golden file are those that its description promises."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.validation.golden.compress import unpacked
from qie.compiler.validation.golden.places import sample_places
from qie.compiler.validation.golden.records import CaseRecord, GoldenRecord, case_tensor, module_tensor
from qie.engines.inputs.image import MAX_PIXELS

__all__ = ["check_layout"]

Arrays = Mapping[str, NDArray[Any]]

C = 64
"""Latent channels of a token."""

_LARGEST = 1 << 31
"""Most elements of a module's output."""


def check_layout(record: GoldenRecord, tensors: Arrays) -> None:
    """Compare names, dtypes and shapes of all tensors, and the sizes of all images, with the description.

    Raises:
        ValueError: one differs; the text says which and how.
    """
    names = [case.name for case in record.cases]
    _expect(0 < len(names) == len(set(names)), "it has no cases, or two of one name")
    rest = dict(tensors)
    for number, case in enumerate(record.cases):
        _check_case(case, rest, case_tensor(number, ""))
    components = [modules.component for modules in record.modules]
    _expect(len(components) == len(set(components)), "it samples a component twice")
    for modules in record.modules:
        _expect(
            len(set(modules.names)) == len(modules.names) == len(modules.shapes)
            and set(modules.blocks) <= set(modules.names),
            f"names, shapes and blocks of the modules of {modules.component} do not belong together",
        )
        for name, shape in zip(modules.names, modules.shapes, strict=True):
            key = module_tensor(modules.component, name)
            _expect(min(shape) > 0 and math.prod(shape) <= _LARGEST, f"{key} is of an output of {list(shape)}")
            _take(rest, key, np.float32, len(sample_places(shape)))
    _expect(not rest, f"it holds {next(iter(rest), '')!r}, which nothing describes")


def _check_case(case: CaseRecord, rest: dict[str, NDArray[Any]], prefix: str) -> None:
    """Take the tensors of a case out of ``rest``, each of the right kind."""

    def take(name: str, dtype: type[np.generic], *dims: int | None) -> NDArray[Any]:
        return _take(rest, prefix + name, dtype, *dims)

    def image(name: str, size: tuple[int, int] | None = None) -> tuple[int, int]:
        return _image_size(prefix + name, take(name, np.uint8, None), size)

    last = (case.recorded or (-1,))[-1]
    _expect(
        list(case.recorded) == sorted(set(case.recorded)) and 0 <= last < case.steps,
        f"case {case.name!r} records the steps {list(case.recorded)} of {case.steps}",
    )
    result = (case.width, case.height)
    _expect(not (case.width % 16 or case.height % 16), f"case {case.name!r} has a result of {result}")
    noise, steps = case.width * case.height // 256, len(case.recorded)
    for number in range(case.images):
        image(f"input.{number}")
        width, height = image(f"reference_image.{number}")
        take(f"reference_latents.{number}", np.float32, width * height // 256, C)
    for name in ("edit", *["target"] * case.target, *(f"chain.{number}" for number in range(case.chain))):
        image(name, result)
    grid = take("grid_thw", np.int64, case.images, 3)
    _expect(bool((grid > 0).all() and (grid < 1 << 16).all()), f"{prefix}grid_thw has a side that no image has")
    unpacked(take("patches", np.uint8, None), int(grid.prod(axis=1).sum()))
    _, width = take("image_embeds", np.float32, None, None).shape
    prompt = len(take("input_ids", np.int64, None))
    take("position_ids", np.int64, 3, prompt)
    for name in ("prompt_embeds", *["negative_embeds"] * (case.guidance > 1)):
        take(name, np.float32, None, width)
    for name in ("noise", "noise_bfloat16", "final_latents"):
        take(name, np.float32, noise, C)
    take("sigmas", np.float32, case.steps + 1)
    for name in ("latents", "latents_next", "velocity", *["negative_velocity"] * (case.guidance > 1)):
        take(name, np.float32, steps, noise, C)


def _take(rest: dict[str, NDArray[Any]], name: str, dtype: type[np.generic], *dims: int | None) -> NDArray[Any]:
    """The tensor ``name``, taken out of ``rest``; a dim that is None may be any but 0."""
    array = rest.pop(name, None)
    if array is None:
        raise ValueError(f"it lacks {name!r}")
    fits = array.ndim == len(dims) and all(
        size > 0 if wanted is None else size == wanted for size, wanted in zip(array.shape, dims, strict=True)
    )
    shown = [size or "any" for size in dims]
    _expect(
        array.dtype == dtype and fits,
        f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {shown}",
    )
    return array


def _image_size(name: str, content: NDArray[Any], expected: tuple[int, int] | None) -> tuple[int, int]:
    """Width and height of a PNG, of which only the header is read."""
    try:
        with Image.open(io.BytesIO(content.tobytes()), formats=["PNG"]) as opened:
            size = opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is no PNG image ({type(error).__name__})") from None
    _expect(math.prod(size) <= MAX_PIXELS, f"{name} has {size[0]} x {size[1]} pixels")
    _expect(expected in (None, size), f"{name} has {size} pixels, expected {expected}")
    return size


def _expect(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)
