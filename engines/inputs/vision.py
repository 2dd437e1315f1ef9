"""The inputs of the vision tower: patches, windows and rotary tables, computed on the host.

Most blocks of the tower attend within windows, so the patches are put into window order here, with the index that
returns the merger's output to the image processor's order.

Shape suffixes: P patches of all images together, M = P / merge_size ** 2 merged cells; X values of a patch, 3 *
temporal_patch_size * patch_size ** 2; A = head_dim / 2 rotary angles; H W C height, width and 3 channels of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.specs import VisionSpec
from qie.engines.errors import ImageError
from qie.engines.inputs.image import MAX_ASPECT
from qie.engines.inputs.rotary import rotary_frequencies

__all__ = ["VisionInputs", "smart_resize", "vision_inputs"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VisionInputs:
    """Inputs of the vision tower for the images of one edit; the rows of P are in window order.

    Attributes:
        patches: float32 [P, X], normalized.
        window_ids: int64 [P], equal exactly for patches of one window; a window belongs to one image.
        image_ids: int64 [P], index of the patch's image.
        rotary_cos, rotary_sin: float32 [P, A], angles of the row, then of the column; both halves of a head share them.
        raster_index: int64 [M], ``merged[raster_index]`` is the merger's output image after image, in raster order.
        grids: (frames, height, width) of each image in patches; frames is 1.
    """

    patches: NDArray[np.float32]
    window_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    rotary_cos: NDArray[np.float32]
    rotary_sin: NDArray[np.float32]
    raster_index: NDArray[np.int64]
    grids: tuple[tuple[int, int, int], ...]


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels to which the tower resizes an image of this size.

    Both are multiples of ``factor``; their product lies within ``min_pixels`` .. ``max_pixels`` where the aspect allows
    it (transformers image_processing_pil_qwen2_vl.py, ``smart_resize``).

    Raises:
        ImageError: one side is more than ``MAX_ASPECT`` times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"an image has {width} x {height} pixels, expected a side of at most {MAX_ASPECT} times the other; crop it"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def vision_inputs(images: Sequence[Image.Image], spec: VisionSpec) -> VisionInputs:
    """The tower's inputs for the images of one edit, mode RGB, in the order in which the prompt names them.

    Equal to transformers' ``Qwen2VLImageProcessorPil``, followed by ``get_vision_window_index`` and
    ``get_vision_position_ids`` of vision_utils.py.

    Raises:
        ImageError: an image is too narrow.
    """
    unit = spec.merge_size**2
    patches, windows, image_ids, positions, grids = [], [], [], [], []
    window_count = 0
    for number, image in enumerate(images):
        patches_PX, grid_h, grid_w = _patches(image, spec)
        window_ids_M = window_count + _windows(grid_h // spec.merge_size, grid_w // spec.merge_size, spec)
        window_count = int(window_ids_M.max()) + 1
        patches.append(patches_PX)
        windows.append(window_ids_M)
        image_ids.append(np.full(len(patches_PX), number))
        positions.append(_positions(grid_h, grid_w, spec.merge_size))
        grids.append((1, grid_h, grid_w))

    # Cells of a window follow each other, within it in raster order: a stable sort by window.
    window_ids_M = np.concatenate(windows)
    window_index_M = np.argsort(window_ids_M, kind="stable")
    window_index_P = (window_index_M[:, None] * unit + np.arange(unit)).ravel()
    angles_PA = _angles(np.concatenate(positions)[window_index_P], spec)
    return VisionInputs(
        patches=np.concatenate(patches)[window_index_P],
        window_ids=np.repeat(window_ids_M[window_index_M], unit),
        image_ids=np.concatenate(image_ids),  # window order keeps each image's rows together
        rotary_cos=np.cos(angles_PA).astype(np.float32),
        rotary_sin=np.sin(angles_PA).astype(np.float32),
        raster_index=np.argsort(window_index_M),
        grids=tuple(grids),
    )


def _patches(image: Image.Image, spec: VisionSpec) -> tuple[NDArray[np.float32], int, int]:
    """Patches [P, X] of one image, merged cell after merged cell, and its height and width in patches."""
    patch, merge = spec.patch_size, spec.merge_size
    height, width = smart_resize(
        image.height, image.width, factor=patch * merge, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels
    )
    pixels_HWC = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))

    # A channel has 256 levels. As in transformers' image processor they are scaled in float64, rounded, and
    # normalized in float32.
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = np.asarray(spec.image_mean, np.float32), np.asarray(spec.image_std, np.float32)
    normalized = (levels[:, None] - mean) / std
    values_HWC = normalized[pixels_HWC, np.arange(3)]

    grid_h, grid_w = height // patch, width // patch
    cells = values_HWC.reshape(grid_h // merge, merge, patch, grid_w // merge, merge, patch, 3)
    cells = cells.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    cells = np.broadcast_to(cells, (*cells.shape[:5], spec.temporal_patch_size, patch, patch))
    return cells.reshape(grid_h * grid_w, -1), grid_h, grid_w


def _windows(rows: int, columns: int, spec: VisionSpec) -> NDArray[np.int64]:
    """Window of every merged cell of one image: int64 [M]; cells and windows are in raster order."""
    side = spec.window_size // spec.merge_size // spec.patch_size
    window_columns = -(-columns // side)
    return (np.arange(rows)[:, None] // side * window_columns + np.arange(columns) // side).ravel()


def _positions(grid_h: int, grid_w: int, merge: int) -> NDArray[np.int64]:
    """Row and column of every patch of one image, merged cell after merged cell: int64 [P, 2]."""
    position_HW2 = np.stack(np.meshgrid(np.arange(grid_h), np.arange(grid_w), indexing="ij"), axis=-1)
    cells = position_HW2.reshape(grid_h // merge, merge, grid_w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, 2)


def _angles(positions_P2: NDArray[np.int64], spec: VisionSpec) -> NDArray[np.float64]:
    """Rotary angles [P, A] in radians, float32 values (modeling_qwen2_5_vl.py, ``Qwen2_5_VLVisionRotaryEmbedding``)."""
    angles = positions_P2[:, :, None].astype(np.float32) * rotary_frequencies(spec.head_dim // 2, spec.rope_theta)
    return angles.reshape(len(positions_P2), -1).astype(np.float64)
