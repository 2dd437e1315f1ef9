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
from qie.engines.bundle.specs import SIDE_MULTIPLE, Areas, Size
from qie.engines.editing.embeddings import prompt_embeds
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Request
from qie.engines.editing.settings import Settings, check_prompts, check_references
from qie.engines.editing.stages import Stages
from qie.engines.errors import BundleError
from qie.engines.inputs.prepare import Prepared, prepare
from qie.engines.inputs.prompt import PromptTokens
from qie.engines.inputs.prompt import encode as tokenize
from qie.engines.inputs.tokenizer import load_tokenizer
from qie.engines.inputs.vision import VisionInputs, vision_inputs
from qie.engines.progress import no_progress

__all__ = ["Conditioning", "EncoderInputs", "condition", "encode", "encoder_inputs", "open_tokenizer", "prepare_images"]

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncoderInputs:
    """What the encoders read of a request.

    Attributes:
        copies: the two copies of each image.
        vision: the patches of all images.
        prompts: tokens of each instruction, and of the negative prompt behind them where there is guidance.
        size: of the images to generate.
        guided: whether there is guidance.
    """

    copies: tuple[Prepared, ...]
    vision: VisionInputs
    prompts: tuple[PromptTokens, ...]
    size: Size
    guided: bool

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in tokens of the images to generate, then of each reference image."""
        sizes = [(self.size.height, self.size.width), *(each.vae.shape[:2] for each in self.copies)]
        return tuple((height // SIDE_MULTIPLE, width // SIDE_MULTIPLE) for height, width in sizes)


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
    inputs = encoder_inputs(stages, tokenizer, request, settings)
    return encode(stages, inputs, meter=meter, encoder_cache=encoder_cache)


def encoder_inputs(stages: Stages, tokenizer: Tokenizer, request: Request, settings: Settings) -> EncoderInputs:
    """The two copies of each image and the tokens of each prompt; the negative prompt sees the same images.

    No engine runs: ``stages`` say what the engines take.

    Raises:
        RequestError: an image or instruction cannot be used.
    """
    model = stages.bundle.manifest.model
    copies = prepare_images(request, settings, model.areas)
    check_references([each.vae.shape[:2] for each in copies], stages.engines["vae_encoder"][0])
    vision = vision_inputs([each.vision for each in copies], model.vision)
    tokens = partial(tokenize, tokenizer, grids=vision.grids, spec=model.prompt)
    prompts = [tokens([instruction]) for instruction in request.instructions]
    if settings.guided:
        prompts.append(tokens([request.negative], allow_blank=True))
    check_prompts(prompts, stages.bundle.manifest)
    return EncoderInputs(
        copies=tuple(copies), vision=vision, prompts=tuple(prompts), size=settings.size, guided=settings.guided
    )


def encode(
    stages: Stages,
    inputs: EncoderInputs,
    *,
    meter: Meter | None = None,
    encoder_cache: EncoderCache | None = None,
) -> Conditioning:
    """Images, then prompts, to embeddings, as far as they are not cached; reference images to latents.

    Raises:
        BackendMissingError, BundleError: an engine cannot be loaded.
        EngineError: a backend failed or memory ran out.
    """
    meter = meter or Meter(no_progress)
    embeds = prompt_embeds(stages, inputs.vision, inputs.prompts, meter=meter, cache=encoder_cache)
    with meter("encode") as report:
        latents = stages.encode([each.vae for each in inputs.copies], progress=report)
    return Conditioning(
        prompts=tuple(embeds[:-1] if inputs.guided else embeds),
        negative=embeds[-1] if inputs.guided else None,
        reference=np.concatenate([latents_hwC.reshape(1, -1, latents_hwC.shape[-1]) for latents_hwC in latents], 1),
        grids=inputs.grids,
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
