"""Noise latents as tokens, and the rotary tables of the transformer.

Shape suffixes: B batch, C latent channels, H W latent height and width (pixels / 8), N = (H / 2) * (W / 2) tokens,
D = 4 * C channels per token; L text tokens, T image tokens (noise and references), R = L + T rows of A = head_dim / 2
rotary angles.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import RotarySpec
from qie.engines.errors import RequestError
from qie.engines.inputs.noise import standard_normal

__all__ = ["MAX_POSITIONS", "noise_latents", "pack", "rotary_frequencies", "rotary_tables"]

MAX_POSITIONS = 4096
"""Positions on either side of 0 in the model's rotary table (diffusers transformer_qwenimage.py, ``QwenEmbedRope``)."""


def rotary_tables(
    spec: RotarySpec, *, text_tokens: int, grids: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotary angles, each float32 [R, A], rows in the order text, noise, references.

    Frame positions number the images from 0; height and width positions are centered, so that an axis of n runs from
    -(n - n // 2) to n // 2 - 1. Text starts where the largest image ends, with one position for all three axes
    (``QwenEmbedRope.forward``, scale_rope true).

    Args:
        spec: constants of the model's rotary embedding.
        text_tokens: L, tokens of the prompt without its prefix.
        grids: (height, width) in tokens of the image being generated, then of each reference image.

    Raises:
        RequestError: the text would reach beyond ``MAX_POSITIONS``.
    """
    text_start = max(max(height // 2, width // 2) for height, width in grids)
    if text_start + text_tokens > MAX_POSITIONS:
        raise RequestError(
            f"the prompt has {text_tokens} tokens, expected at most {MAX_POSITIONS - text_start} with images of this "
            "size; shorten the instruction or use smaller images"
        )
    text_L3 = np.repeat(np.arange(text_start, text_start + text_tokens)[:, None], 3, axis=1)
    positions_R3 = np.concatenate([text_L3, *(_image_positions(i, *grid) for i, grid in enumerate(grids))])
    angles_RA = np.concatenate(
        [
            np.outer(positions_R3[:, axis].astype(np.float32), rotary_frequencies(dim, spec.theta))
            for axis, dim in enumerate(spec.axes_dims)
        ],
        axis=1,
    ).astype(np.float64)
    return np.cos(angles_RA).astype(np.float32), np.sin(angles_RA).astype(np.float32)


def _image_positions(frame: int, height: int, width: int) -> NDArray[np.int64]:
    """Frame, height and width position of every token of an image in raster order: int64 [height * width, 3]."""
    rows_HW, columns_HW = np.meshgrid(
        np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2), indexing="ij"
    )
    return np.stack([np.full(height * width, frame), rows_HW.ravel(), columns_HW.ravel()], axis=1)


def rotary_frequencies(dim: int, theta: float) -> NDArray[np.float32]:
    """Radians a position of each rotary pair: theta ** (-2 i / dim), i = 0 .. dim / 2 - 1, float32 [dim / 2].

    Each operation is rounded to float32 as in ``QwenEmbedRope.rope_params``: at position 4000 another rounding would
    change an angle by 0.0002.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def pack(latents_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents float32 [B, C, H, W] as tokens [B, N, D]: raster of 2 x 2 patches, channel-major (``_pack_latents``)."""
    B, C, H, W = latents_BCHW.shape
    patches = latents_BCHW.reshape(B, C, H // 2, 2, W // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (H // 2) * (W // 2), 4 * C)


def noise_latents(
    seeds: Sequence[int], height: int, width: int, channels: int, dtype: Literal["float32", "bfloat16"]
) -> NDArray[np.float32]:
    """The noise that an edit starts from: float32 [B, N, D], one batch entry a seed.

    An entry is what a pipeline draws for one image with ``generator=torch.Generator("cpu").manual_seed(seed)``,
    whatever else is in the batch.

    Args:
        seeds: one per batch entry.
        height: of the image in pixels, a multiple of 16.
        width: as ``height``.
        channels: C.
        dtype: the type in which the noise is drawn; a seed gives different noise in another type.

    Raises:
        RequestError: torch refuses a seed.
    """
    shape = (1, 1, channels, height // 8, width // 8)
    return np.concatenate([pack(standard_normal(shape, seed=seed, dtype=dtype)[:, 0]) for seed in seeds])
