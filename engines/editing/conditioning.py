"""What the transformer reads of a request: prompt embeddings and the latents of the reference images.

Shape suffixes: L text tokens, R reference tokens, D width of the language model, C = 64 latent channels of a token,
h w latent tokens of an image.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.specs import SIDE_MULTIPLE, Areas
from qie.engines.editing.embeddings import prompt_embeds
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Request
from qie.engines.editing.settings import Settings, check_prompts, check_references
from qie.engines.editing.stages import Stages
from qie.engines.errors import BundleError
from qie.engines.inputs.image import Prepared, prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.tokenizer import load_tokenizer
from qie.engines.inputs.vision import vision_inputs
from qie.engines.progress import no_progress

__all__ = ["Conditioning", "condition", "open_tokenizer", "prepare_images"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditioning:
    """What the transformer reads of a request at every step.

    Attributes:
        prompts: float32 [1, L, D] of each instruction.
        negative: float32 [1, L, D]; None without guidance.
        reference: float32 [1, R, C], latents of the reference images, one after the other.
        grids: (height, width) in tokens of the images to generate, then of each reference image.
    """

    prompts: tuple[Array, ...]
    negative: Array | None
    reference: Array
    grids: tuple[tuple[int, int], ...]


def condition(
    stages: Stages,
    tokenizer: Tokenizer,
    request: Request,
    settings: Settings,
    *,
    meter: Meter | None = None,
    encoder_cache: EncoderCache | None = None,
) -> Conditioning:
    """Run the stages before denoising; everything is checked before an engine is loaded.

    Args:
        stages: the engines.
        tokenizer: of the bundle.
        request: what to edit.
        settings: of the request.
        meter: of the edit.
        encoder_cache: of embeddings that need not be computed again; None computes them all.

    Raises:
        RequestError: an image or instruction cannot be used.
        EngineError: a backend failed or memory ran out.
    """
    meter = meter or Meter(no_progress)
    model = stages.bundle.manifest.model

    # 1. The two copies of each image, and the tokens of each prompt. The negative prompt sees the same images.
    prepared = prepare_images(request, settings, model.areas)
    check_references([copies.vae.shape[:2] for copies in prepared], stages.engines["vae_encoder"][0])
    vision = vision_inputs([copies.vision for copies in prepared], model.vision)
    tokens = partial(encode, tokenizer, grids=vision.grids, spec=model.prompt)
    prompts = [tokens([instruction]) for instruction in request.instructions]
    if settings.guided:
        prompts.append(tokens([request.negative], allow_blank=True))
    check_prompts(prompts, stages.bundle.manifest)

    # 2. Images, then prompts, to embeddings, as far as they are not cached.
    embeds = prompt_embeds(stages, vision, prompts, meter=meter, cache=encoder_cache)

    # 3. Reference images to latents.
    with meter("encode") as report:
        latents = stages.encode([copies.vae for copies in prepared], progress=report)
    size = settings.size
    return Conditioning(
        prompts=tuple(embeds[: len(request.instructions)]),
        negative=embeds[-1] if settings.guided else None,
        reference=np.concatenate([latents_hwC.reshape(1, -1, latents_hwC.shape[-1]) for latents_hwC in latents], 1),
        grids=(
            (size.height // SIDE_MULTIPLE, size.width // SIDE_MULTIPLE),
            *((latents_hwC.shape[0], latents_hwC.shape[1]) for latents_hwC in latents),
        ),
    )


def prepare_images(request: Request, settings: Settings, areas: Areas) -> list[Prepared]:
    """The two copies of every image of ``request``; the last one has the size that ``settings`` say.

    Raises:
        ImageError: an image is too narrow.
    """
    *others, last = request.images
    prepared = [prepare(image, areas) for image in others]
    return [*prepared, prepare(last, areas, size=settings.reference)]


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        BundleError: its file is damaged.
    """
    name = bundle.manifest.tokenizer.path
    try:
        return load_tokenizer(bundle.folder.read(lambda folder: (folder / name).read_bytes()))
    except (OSError, ValueError) as problem:
        raise BundleError(
            f"{bundle.path / name} is damaged ({problem}); build the bundle again with `qie build`"
        ) from None
