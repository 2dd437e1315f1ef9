"""A prompt and its images as vLLM takes them: one token for each image, and the grid of its patches.

Shape suffixes: S prompt tokens, P patches of all images together, V image tokens, M = V merged cells, A rotary angles,
X values of a patch, D width of the language model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "Prompt", "raster_patches", "read_prompt", "vision_grids"]

Grid = tuple[int, int, int]
"""(frames, height, width) of an image in patches; frames is 1."""

SAME_ANGLE = 1e-3
"""Radians between angles that are one: float32 values of the same number, against 0.0177 between two of the numbers up
to 709 (the nearest are 44 apart, seven turns)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: with one token for each image, which vLLM repeats for each of its embeddings.
        expanded_ids: with all of them, as the tokenizer made them.
        grids: of each image.
        embeds: float32 [v, D] of each image.
    """

    token_ids: list[int]
    expanded_ids: list[int]
    grids: list[Grid]
    embeds: list[NDArray[np.float32]]


def read_prompt(feed: Mapping[str, NDArray[Any]], *, image_token_id: int, merge_size: int) -> Prompt:
    """The prompt in the inputs of the language model (``language_feed``), a batch of one without padding.

    The positions of an image's tokens say how many rows and columns it has.
    """
    ids_S, index_S = feed["input_ids"][0], feed["image_index"][0]
    positions_3S, embeds_VD = feed["position_ids"][:, 0], feed["image_embeds"]
    is_image_S = index_S >= 0
    first_S = is_image_S & ~np.concatenate([[False], is_image_S[:-1]])
    grids: list[Grid] = []
    embeds = []
    for start in np.flatnonzero(first_S):
        text = np.flatnonzero(~is_image_S[start:])
        end = start + (int(text[0]) if len(text) else len(ids_S) - start)
        rows, columns = (int(axis.max() - axis.min()) + 1 for axis in positions_3S[1:, start:end])
        assert rows * columns == end - start, f"an image of {rows} x {columns} cells has {end - start} tokens"
        assert (ids_S[start:end] == image_token_id).all(), f"an image token is not {image_token_id}"
        assert (np.diff(index_S[start:end]) == 1).all(), "embeddings of an image are not in order"
        grids.append((1, rows * merge_size, columns * merge_size))
        embeds.append(embeds_VD[index_S[start] : index_S[start] + end - start])
    assert sum(len(each) for each in embeds) == len(embeds_VD), "embeddings of an image are in no prompt"
    kept_S = ~is_image_S | first_S
    return Prompt(token_ids=ids_S[kept_S].tolist(), expanded_ids=ids_S.tolist(), grids=grids, embeds=embeds)


def vision_grids(feed: Mapping[str, NDArray[Any]]) -> list[Grid]:
    """The grid of each image in the inputs of the vision tower (``vision_feed``).

    The first angle of either half of a patch's angles is its row, or its column, in radians (frequency 1), so that an
    image has as many rows as different first angles.
    """
    cos_PA, sin_PA, image_P = feed["rotary_cos"], feed["rotary_sin"], feed["image_ids"]
    grids: list[Grid] = []
    for image in range(int(image_P[-1]) + 1):
        mine_P = image_P == image
        rows, columns = (
            _different(np.arctan2(sin_PA[mine_P, first], cos_PA[mine_P, first])) for first in (0, cos_PA.shape[1] // 2)
        )
        assert rows * columns == mine_P.sum(), f"an image of {rows} x {columns} has {mine_P.sum()} patches"
        grids.append((1, rows, columns))
    return grids


def raster_patches(feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The patches [P, X] of ``vision_feed`` in the order of the image processor, cell after cell in raster order."""
    patches_PX, index_M = feed["patches"], feed["raster_index"]
    unit = len(patches_PX) // len(index_M)
    ordered: NDArray[np.float32] = patches_PX[(index_M[:, None] * unit + np.arange(unit)).ravel()]
    return ordered


def _different(angles: NDArray[np.float32]) -> int:
    """How many different angles there are."""
    return 1 + int((np.diff(np.sort(angles)) > SAME_ANGLE).sum())
