"""The inputs of every engine as host arrays by name: the only place that spells them.

A feed is what Polygraphy and onnxruntime call the inputs of one run. Each function takes what the files beside this one
compute and returns the arrays that a graph of that component reads (docs/graphs.md has the contracts).

Shape suffixes: P patches, V image tokens of the prompt, S prompt tokens, L text tokens, D width of the language model,
H W pixels, h w = H / 16, W / 16 latent tokens, B images of the batch, N noise tokens, R reference tokens, C = 64 latent
channels of a token, A rotary angles, Y layers, M modulation values of a layer, O modulation values of the output norm,
K steps of a schedule.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import RotarySpec
from qie.engines.inputs.prompt import PromptTokens
from qie.engines.inputs.rotary import rotary_tables
from qie.engines.inputs.vision import VisionInputs

__all__ = [
    "SCHEDULE_INPUTS",
    "Feed",
    "decoder_feed",
    "encoder_feed",
    "guidance_feed",
    "guidance_inputs",
    "guidance_scales",
    "language_feed",
    "latents_feed",
    "schedule_feed",
    "step_feed",
    "text_feed",
    "transformer_feed",
    "vision_feed",
]

Feed = dict[str, NDArray[Any]]
Float32 = NDArray[np.float32]
Value = TypeVar("Value")

SCHEDULE_INPUTS = ("modulation", "modulation_out", "dsigma")
"""The transformer's inputs that hold all steps of a schedule, from ``schedule_feed``."""


def vision_feed(inputs: VisionInputs) -> Feed:
    """Inputs of the vision tower for the images of one edit: patches [P, X] and their windows, images and angles."""
    return {
        "patches": inputs.patches,
        "window_ids": inputs.window_ids,
        "image_ids": inputs.image_ids,
        "rotary_cos": inputs.rotary_cos,
        "rotary_sin": inputs.rotary_sin,
        "raster_index": inputs.raster_index,
    }


def language_feed(tokens: PromptTokens, image_embeds_VD: Float32) -> Feed:
    """Inputs of the language model for a batch of prompts [B, S] about the same images."""
    return {
        "input_ids": tokens.input_ids,
        "image_embeds": image_embeds_VD,
        "image_index": tokens.image_index,
        "position_ids": tokens.position_ids,
    }


def encoder_feed(image_HWC: NDArray[np.uint8]) -> Feed:
    """Inputs of the VAE encoder for one image, uint8 [H, W, 3]."""
    return {"image": image_HWC[None]}


def decoder_feed(latents_hwC: Float32) -> Feed:
    """Inputs of the VAE decoder for the latents [h, w, C] of one image."""
    return {"latents": latents_hwC[None]}


def transformer_feed(
    *,
    latents_BNC: Float32,
    reference_BRC: Float32,
    prompt_BLD: Float32,
    rotary: RotarySpec,
    grids: Sequence[tuple[int, int]],
    modulation_YM: Float32,
    modulation_out_O: Float32,
    dsigma: float | np.float32,
    negative_velocity_BNC: Float32 | None = None,
    guidance: float = 1.0,
) -> Feed:
    """The transformer's eleven inputs for one pass of one step.

    Args:
        latents_BNC: of the images being generated, at the sigma of the step.
        reference_BRC: latents of the reference images, one after the other.
        prompt_BLD: prompt embeddings.
        rotary: constants of the model's rotary embedding.
        grids: (height, width) in tokens of the image being generated, then of each reference image.
        modulation_YM: of every block at this step, ``Tables.blocks[step]``.
        modulation_out_O: of the output norm at this step, ``Tables.out[step]``.
        dsigma: sigma of the next step minus sigma of this one; negative.
        negative_velocity_BNC: velocity of the negative pass of this step; None without guidance.
        guidance: scale of classifier-free guidance; 1 without guidance.
    """
    negative_velocity_BNC = np.zeros_like(latents_BNC) if negative_velocity_BNC is None else negative_velocity_BNC
    return {
        **latents_feed(latents_BNC, reference_BRC),
        **text_feed(prompt_BLD, rotary, grids),
        **schedule_feed(modulation_YM[None], modulation_out_O[None], np.full(1, dsigma, np.float32)),
        **step_feed([0] * len(latents_BNC)),
        **guidance_feed(negative_velocity_BNC, [guidance] * len(latents_BNC)),
    }


def latents_feed(latents_BNC: Float32, reference_BRC: Float32) -> Feed:
    """The part of ``transformer_feed`` that both passes of a step share."""
    return {"latents": latents_BNC, "reference": reference_BRC}


def text_feed(prompt_BLD: Float32, rotary: RotarySpec, grids: Sequence[tuple[int, int]]) -> Feed:
    """The part of ``transformer_feed`` that belongs to a prompt; rotary tables [L + N + R, A] depend on its length.

    Raises:
        RequestError: the prompt is too long for images of this size.
    """
    cos_TA, sin_TA = rotary_tables(rotary, text_tokens=prompt_BLD.shape[1], grids=grids)
    return {"prompt_embeds": prompt_BLD, "rotary_cos": cos_TA, "rotary_sin": sin_TA}


def schedule_feed(modulation_KYM: Float32, modulation_out_KO: Float32, dsigma_K: Float32) -> Feed:
    """The part of ``transformer_feed`` that belongs to a schedule, ``SCHEDULE_INPUTS``."""
    return {
        "modulation": modulation_KYM.reshape(-1, modulation_KYM.shape[2]),
        "modulation_out": modulation_out_KO,
        "dsigma": dsigma_K,
    }


def step_feed(step_B: Sequence[int]) -> Feed:
    """The part of ``transformer_feed`` that says at which step of its schedule each image is."""
    return {"step": np.array(step_B, np.int64)}


def guidance_feed(negative_velocity_BNC: Float32, guidance_B: Sequence[float]) -> Feed:
    """The part of ``transformer_feed`` that guides the pass; zeros and 1 for an image without guidance."""
    return guidance_inputs(negative_velocity_BNC, guidance_scales(guidance_B))


def guidance_inputs(negative_velocity: Value, scales: Value) -> dict[str, Value]:
    """The inputs of ``guidance_feed`` by name, as arrays or as tensors that the engine has already."""
    return {"negative_velocity": negative_velocity, "guidance": scales}


def guidance_scales(guidance_B: Sequence[float]) -> Float32:
    """The scale of classifier-free guidance of each image as the transformer reads it: float32 [B]."""
    return np.array(guidance_B, np.float32)
