"""What the host computes before engines run, for a golden case: images, patches, tokens, noise and schedule."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed, request_of
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.editing.conditioning import open_tokenizer, prepare_images
from qie.engines.editing.settings import resolve
from qie.engines.inputs.feeds import (
    Feed,
    decoder_feed,
    encoder_feed,
    language_feed,
    transformer_feed,
    vision_feed,
)
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.prepare import Prepared
from qie.engines.inputs.prompt import PromptTokens, encode
from qie.engines.inputs.rotary import noise_latents
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.vision import VisionInputs, vision_inputs

__all__ = ["component_feed", "differing_inputs", "grids_of", "prompt_tokens", "vision_of"]

Arrays = Mapping[str, NDArray[Any]]


def differing_inputs(bundle: Bundle, case: GoldenCase) -> tuple[int, list[str]]:
    """Number of inputs that were compared, and the names of those that are not equal to the reference's."""
    found, expected = _own(bundle, case), _expected(case)
    differing = [name for name in expected if not np.array_equal(found[name], expected[name])]
    return len(expected), differing


def vision_of(bundle: Bundle, case: GoldenCase) -> VisionInputs:
    """The inputs of the vision tower."""
    return vision_inputs([copies.vision for copies in _prepared(bundle, case)], bundle.manifest.model.vision)


def prompt_tokens(bundle: Bundle, tokenizer: Tokenizer, case: GoldenCase) -> list[PromptTokens]:
    """The tokens of the instruction, and of the negative prompt where there is guidance."""
    grids, spec = vision_of(bundle, case).grids, bundle.manifest.model.prompt
    prompts = [encode(tokenizer, [case.record.instruction], grids=grids, spec=spec)]
    if case.negative_embeds is not None:
        prompts.append(encode(tokenizer, [case.record.negative], grids=grids, spec=spec, allow_blank=True))
    return prompts


def grids_of(case: GoldenCase) -> list[tuple[int, int]]:
    """(height, width) in tokens of the result, then of each reference image."""
    sides = [(case.record.height, case.record.width), *(image_HWC.shape[:2] for image_HWC in case.reference_images)]
    return [(height // SIDE_MULTIPLE, width // SIDE_MULTIPLE) for height, width in sides]


def component_feed(executed: Executed, case: GoldenCase, component: Component, *, step: int = 0) -> Feed:
    """The inputs of one run of ``component``: what the reference had, and what the host computes from it.

    Of the transformer it is the conditional pass of the recorded ``step``, in float32; of the language model the
    instruction; of the VAE encoder the first image.
    """
    bundle, (rows, columns) = executed.bundle, grids_of(case)[0]
    match component:
        case "vision":
            return vision_feed(vision_of(bundle, case))
        case "language":
            return language_feed(prompt_tokens(bundle, executed.tokenizer, case)[0], case.image_embeds)
        case "vae_encoder":
            return encoder_feed(case.reference_images[0])
        case "vae_decoder":
            return decoder_feed(case.final_latents.reshape(rows, columns, -1))
    schedule_S = sigmas(bundle.manifest.model.scheduler, steps=case.record.steps, noise_tokens=len(case.noise))
    tables = modulation_tables(bundle, schedule_S)
    return transformer_feed(
        latents_BNC=case.latents[case.record.recorded.index(step)][None],
        reference_BRC=np.concatenate(case.reference_latents)[None],
        prompt_BLD=case.prompt_embeds[None],
        rotary=bundle.manifest.model.rotary,
        grids=grids_of(case),
        modulation_YM=tables.blocks[step],
        modulation_out_O=tables.out[step],
        dsigma=schedule_S[step + 1] - schedule_S[step],
    )


def _prepared(bundle: Bundle, case: GoldenCase) -> list[Prepared]:
    """The two copies of every image."""
    request, manifest = request_of(case), bundle.manifest
    return prepare_images(request, resolve(request, manifest, denoises=False), manifest.model.areas)


def _own(bundle: Bundle, case: GoldenCase) -> Arrays:
    manifest, record = bundle.manifest, case.record
    vision = vision_of(bundle, case)
    cells = vision.patches.reshape(len(vision.raster_index), -1)[vision.raster_index]
    tokens = prompt_tokens(bundle, open_tokenizer(bundle), case)[0]
    noise_tokens = record.width * record.height // 256
    drawn = {
        dtype: noise_latents([record.seed], record.height, record.width, manifest.model.latent_channels, dtype)[0]
        for dtype in ("float32", "bfloat16")
    }
    return {
        "patches": cells.reshape(vision.patches.shape),
        "grid_thw": np.array(vision.grids),
        "input_ids": tokens.input_ids[0],
        "position_ids": tokens.position_ids[:, 0],
        **{f"reference image {k}": copies.vae for k, copies in enumerate(_prepared(bundle, case))},
        "sigmas": sigmas(manifest.model.scheduler, steps=record.steps, noise_tokens=noise_tokens),
        "noise": drawn["float32"],
        "noise in bfloat16": drawn["bfloat16"],
    }


def _expected(case: GoldenCase) -> Arrays:
    return {
        "patches": case.patches,
        "grid_thw": case.grid_thw,
        "input_ids": case.input_ids,
        "position_ids": case.position_ids,
        **{f"reference image {k}": image_HWC for k, image_HWC in enumerate(case.reference_images)},
        "sigmas": case.sigmas,
        "noise": case.noise,
        "noise in bfloat16": case.noise_bfloat16,
    }
