"""The request of an edit and its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qie.engines.bundle.specs import DEFAULT_NEGATIVE, Size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["Edit", "Request"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to edit and how. A field that is None takes the bundle's default.

    Attributes:
        images: one to three, mode RGB, upright; the last one gives the size of the result.
        instructions: one or more, each applied to the same images.
        seeds: one or more; every instruction is edited with every seed. None draws one.
        negative: prompt that guidance steers away from; the model's own default is a single space.
        steps: denoising steps.
        guidance: scale of true classifier-free guidance; 1 or less turns it off and halves the work.
        size: width and height of the result in pixels; None for the model's area at the last image's aspect.
        match_input: resize the result to the last image's own size.
        noise: start latents float32 [B, N, 64] in place of noise from the seeds.
    """

    images: "Sequence[Image.Image]"
    instructions: Sequence[str]
    seeds: Sequence[int] | None = None
    negative: str = DEFAULT_NEGATIVE
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    match_input: bool = False
    noise: "NDArray[np.float32] | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """The result: one image for each instruction and seed, instructions outermost.

    Attributes:
        images: mode RGB.
        samples: (instruction, seed) of each image.
        size: size of the generated images, before ``match_input``.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        notes: differences from the request, for a person to read.
        seconds: time of each stage.
    """

    images: "tuple[Image.Image, ...]"
    samples: tuple[tuple[str, int], ...]
    size: Size
    steps: int
    guidance: float
    notes: tuple[str, ...]
    seconds: dict[str, float]
