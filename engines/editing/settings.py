"""The settings of an edit: a request with the defaults of a bundle, and every check against its manifest."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

from PIL import Image

from qie.engines.bundle.manifest import EngineRecord, Manifest
from qie.engines.bundle.specs import DEFAULT_NEGATIVE, Size
from qie.engines.editing.request import Request
from qie.engines.errors import ImageError, RequestError
from qie.engines.inputs.prepare import output_size
from qie.engines.inputs.prompt import PREFIX_TOKENS, PromptTokens
from qie.engines.inputs.sizes import nearest_bucket, resolve_size
from qie.engines.inputs.stored_schedules import has_tables, missing_tables, sizes_with_tables

__all__ = ["GUIDANCE_MAX", "Settings", "check_prompts", "check_references", "resolve"]

RESULTS_MAX = 256
"""Most results of one request: their noise, latents and pixels are in memory together, 2 GB at 1024 x 1024."""

ASPECT_TOLERANCE = 0.01
"""Change of an aspect ratio that is not worth a note."""

GUIDANCE_MAX = 1e6
"""Largest guidance scale: far beyond any image, far below the overflow of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A request with every default filled in.

    Attributes:
        size: size of the images to generate.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        reference: size at which the last image is encoded; None for its own at the model's area.
        samples: (index of the instruction, seed) of every image to generate, instructions outermost.
        notes: differences from the request, for a person to read.
    """

    size: Size
    steps: int
    guidance: float
    reference: Size | None
    samples: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]

    @property
    def guided(self) -> bool:
        """Whether every step takes a second, negative pass."""
        return self.guidance > 1


def resolve(request: Request, manifest: Manifest, *, denoises: bool = True) -> Settings:
    """Fill in the defaults of a bundle and check everything that needs neither images' contents nor a tokenizer.

    Args:
        request: what to edit and how.
        manifest: of the bundle.
        denoises: False for what needs no modulation, and so takes any schedule.

    Raises:
        ImageError: there is no image, there are too many, or the last one is too narrow.
        RequestError: the instructions, seeds, steps, guidance, size or a text cannot be used, or the bundle has no
            modulation for steps and size.
    """
    _check_types(request)
    _check_images(request, manifest)
    own = output_size(request.images[-1].size, manifest.model.areas.vae_area)
    size, note = resolve_size(manifest.limits, *(request.size or own))
    moved = request.size is None and note is not None
    _check_texts(request)
    if request.seeds is not None and len(request.seeds) == 0:
        raise RequestError("there is no seed, expected at least 1; give one or leave seeds out", option="seeds")
    if len(request.instructions) * len(request.seeds or (0,)) > RESULTS_MAX:
        raise RequestError(
            f"{len(request.instructions)} instructions with {len(request.seeds or (0,))} seeds are more results than "
            f"{RESULTS_MAX}; ask for them in several requests",
            option="seeds",
        )
    seeds = [secrets.randbelow(2**32)] if request.seeds is None else request.seeds
    steps = manifest.defaults.steps if request.steps is None else request.steps
    steps_max = manifest.model.scheduler.num_train_timesteps
    if steps > steps_max:
        raise RequestError(
            f"the number of steps is {steps}, expected at most {steps_max}; use fewer steps", option="steps"
        )
    size, elsewhere = _with_tables(request, manifest, steps, size, own) if denoises else (size, None)
    moved = moved or elsewhere is not None
    guidance = manifest.defaults.guidance if request.guidance is None else request.guidance
    if not abs(guidance) <= GUIDANCE_MAX:
        raise RequestError(
            f"the guidance scale is {guidance}, expected a finite number; use one such as 4.0",
            option="guidance",
        )
    return Settings(
        size=size,
        steps=steps,
        guidance=guidance,
        reference=size if moved else None,
        samples=tuple((number, seed) for number in range(len(request.instructions)) for seed in seeds),
        notes=tuple(
            note
            for note in (
                note if request.size is not None else elsewhere,
                _changed_shape(request, size, Size(width=own[0], height=own[1])),
                _unused_negative(request, guidance),
            )
            if note
        ),
    )


def _with_tables(
    request: Request, manifest: Manifest, steps: int, size: Size, own: tuple[int, int]
) -> tuple[Size, str | None]:
    """``size``, or where the bundle has no modulation for it and nobody asked for it the nearest that has; and a note.

    Raises:
        RequestError: the bundle has no modulation for so many steps, or not at the size that was asked for.
    """
    if manifest.model.modulation.file is not None or has_tables(manifest, steps, size):
        return size, None
    sizes = sizes_with_tables(manifest, steps)
    if request.size is not None or not sizes:
        raise missing_tables(manifest, steps, size)
    nearest = nearest_bucket(sizes, *own)
    return nearest, (
        f"the image is edited at {nearest} in place of {size}, for which this bundle has no modulation tables of "
        f"{steps} steps"
    )


def _changed_shape(request: Request, size: Size, own: Size) -> str | None:
    """A note where the result does not have the shape of the last image, or shows another part of it."""
    width, height = request.images[-1].size
    if request.size is not None and size != own:
        return (
            f"the image is encoded at {own} and the result is {size}: the result may show a part of the image, or more "
            "than it; leave the size out to edit the whole image"
        )
    wider = size.width / size.height / (width / height) - 1
    if abs(wider) <= ASPECT_TOLERANCE or request.match_input:
        return None
    change = f"{wider:.0%} wider" if wider > 0 else f"{1 / (1 + wider) - 1:.0%} taller"
    return (
        f"the image is {width}x{height} and is edited at {size}, which makes it {change}; match the input to undo that"
    )


def _unused_negative(request: Request, guidance: float) -> str | None:
    if guidance > 1 or request.negative == DEFAULT_NEGATIVE:
        return None
    return f"the negative prompt {request.negative!r} is not used: guidance is off at a scale of {guidance:g}"


def check_references(sizes: Sequence[tuple[int, int]], encoder: EngineRecord) -> None:
    """Check that the VAE encoder's profiles take the (height, width) in pixels of every reference image.

    Raises:
        ImageError: an image is so wide or tall that its copy at the model's area does not fit.
    """
    for profile in encoder.profiles:
        (_, *smallest, _), (_, *largest, _) = profile.min, profile.max
        for number, (height, width) in enumerate(sizes, start=1):
            if not (smallest[0] <= height <= largest[0] and smallest[1] <= width <= largest[1]):
                raise ImageError(
                    f"image {number} would be encoded at {width}x{height} pixels, expected sides from {max(smallest)} "
                    f"to {min(largest)}; crop it closer to a square"
                )


def check_prompts(prompts: Sequence[PromptTokens], manifest: Manifest) -> None:
    """Check that the engines take the longest prompt.

    Raises:
        RequestError: a prompt is too long.
    """
    tokens_max = manifest.limits.prompt_tokens_max
    tokens = max(max(prompt.lengths) for prompt in prompts) - PREFIX_TOKENS
    if tokens > tokens_max:
        raise RequestError(
            f"a prompt has {tokens} tokens with its images, expected at most {tokens_max}; shorten the instruction or "
            "leave out an image"
        )


def _check_types(request: Request) -> None:
    """Check what a type checker would, for callers that have none."""
    for field, kind in (("images", "PIL images"), ("instructions", "strings"), ("seeds", "whole numbers")):
        value = getattr(request, field)
        if field == "seeds" and value is None:
            continue
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RequestError(
                f"{field} is {_shown(value)}, expected a list of {kind}; put it into a list", option=field
            )
    for number, image in enumerate(request.images, start=1):
        if not isinstance(image, Image.Image):
            raise ImageError(f"image {number} is {_shown(image)}, expected a PIL image; open it with Image.open")
        if image.mode != "RGB":
            raise ImageError(f"image {number} has mode {image.mode}, expected RGB; convert it with image.convert")
    for text in (*request.instructions, request.negative):
        if not isinstance(text, str):
            raise RequestError(f"{_shown(text)} is not text; give instructions and negative prompts as strings")
    if request.steps is not None and not _is_whole(request.steps):
        raise RequestError(f"steps is {_shown(request.steps)}; give a whole number", option="steps")
    if isinstance(request.guidance, bool) or not isinstance(request.guidance, int | float | None):
        raise RequestError(f"guidance is {_shown(request.guidance)}; give a number such as 4.0", option="guidance")
    size = request.size
    if size is not None and not (isinstance(size, Sequence) and len(size) == 2 and all(map(_is_whole, size))):
        raise RequestError(
            f"size is {_shown(size)}; give width and height in pixels, such as (1024, 768)", option="size"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value for a message: cut where it is long, and with the name of its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _check_images(request: Request, manifest: Manifest) -> None:
    images_max = 1 if manifest.model.pipeline == "edit" else manifest.limits.references_max
    if not request.images:
        raise ImageError("there is no image, expected at least 1; give one before the instruction")
    if len(request.images) > images_max:
        raise ImageError(
            f"{len(request.images)} images were given, this bundle takes at most {images_max}; use fewer",
            option="images",
        )


def _check_texts(request: Request) -> None:
    if not request.instructions:
        raise RequestError(
            'there is no instruction; say what to change, for example "make it grayscale"', option="instructions"
        )
    for text in (*request.instructions, request.negative):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(f"{text!r} is not UTF-8 text; write it again", option="instructions")
