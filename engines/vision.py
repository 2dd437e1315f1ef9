"""The inputs of the vision tower: patches, windows and rotary tables, computed on the host.

Most blocks of the tower attend within windows, so the patches are put into window order here, and the host says how the
merger's output returns to the processor's order.

Shape suffixes: P patches of all images together, M = P / merge_size ** 2 merged cells; X values of a patch, 3 *
temporal_patch_size * patch_size ** 2; A = head_dim / 2 rotary angles; H W C height, width and 3 channels of an image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.errors import CheckpointError, EditError
from qie.engines.image import MAX_ASPECT
from qie.engines.latents import rotary_frequencies
from qie.engines.records import is_number

__all__ = ["VisionInputs", "VisionSpec", "smart_resize", "vision_inputs"]

_VISION_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "hidden_size": 3584,
    "num_heads": 16,
}
"""transformers configuration_qwen2_5_vl.py, `Qwen2_5_VLVisionConfig`."""

_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
}
"""Options of the processor that `vision_inputs` knows no other value of."""

_PROCESSOR_DEFAULTS: dict[str, Any] = _FIXED | {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
"""transformers image_processing_pil_qwen2_vl.py, `Qwen2VLImageProcessorPil`; mean and std are those of CLIP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """What the host must know of a vision tower and its processor.

    patch_size: side of a patch in pixels
    merge_size: side in patches of the square that becomes one token of the prompt
    temporal_patch_size: frames in a patch; an image is repeated that often
    window_size: side of an attention window in pixels
    head_dim: channels of an attention head, a multiple of 4
    rope_theta: base of the rotary wavelengths
    min_pixels, max_pixels: limits of an image's area in square pixels
    image_mean, image_std: per channel, on values of 0 .. 1
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int
    head_dim: int
    rope_theta: float = 10000.0
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @classmethod
    def from_configs(cls, vision_config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "VisionSpec":
        """The spec in `vision_config` of text_encoder/config.json and in preprocessor_config.json, both parsed.

        What is absent or null takes the default of transformers. The limits stand in min_pixels and max_pixels or,
        where those are missing, in the size's shortest_edge and longest_edge (areas, in spite of their names).
        Raises CheckpointError when the processor does not fit the tower or prepares images in another way.
        """
        tower = _VISION_DEFAULTS | _present(vision_config)
        processor = _PROCESSOR_DEFAULTS | _present(preprocessor)
        required = _FIXED | {
            "patch_size": tower["patch_size"],
            "merge_size": tower["spatial_merge_size"],
            "temporal_patch_size": tower["temporal_patch_size"],
        }
        for option, expected in required.items():
            if processor[option] != expected:
                raise CheckpointError(
                    f"preprocessor_config.json has {option} = {processor[option]!r}, but this vision tower needs "
                    f"{expected!r}: take both files from the same checkpoint."
                )
        size = processor["size"]
        if not isinstance(size, Mapping):
            raise _malformed("size", size, "shortest_edge and longest_edge")
        size = _PROCESSOR_DEFAULTS["size"] | _present(size)
        least = processor.get("min_pixels", size["shortest_edge"])
        most = processor.get("max_pixels", size["longest_edge"])
        if not (is_number(least) and is_number(most) and 0 < least <= most):
            raise _malformed("min_pixels and max_pixels", (least, most), "two areas in pixels, the smaller one first")
        for option in ("image_mean", "image_std"):
            values = processor[option]
            numbers = isinstance(values, list | tuple) and len(values) == 3 and all(map(is_number, values))
            if not numbers or (option == "image_std" and min(values) <= 0):
                raise _malformed(option, values, "one number for each of 3 channels")
        return cls(
            patch_size=tower["patch_size"],
            merge_size=tower["spatial_merge_size"],
            temporal_patch_size=tower["temporal_patch_size"],
            window_size=tower["window_size"],
            head_dim=tower.get("head_dim", tower["hidden_size"] // tower["num_heads"]),
            rope_theta=float(tower.get("rope_parameters", {}).get("rope_theta", 10000.0)),
            min_pixels=least,
            max_pixels=most,
            image_mean=tuple(processor["image_mean"]),
            image_std=tuple(processor["image_std"]),
        )


def _malformed(option: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"preprocessor_config.json has {option} = {value!r}, expected {expected}: take the file from the published "
        "checkpoint."
    )


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VisionInputs:
    """Inputs of the vision tower for the images of one edit; the rows of P are in window order.

    patches: float32 [P, X], normalized
    window_ids: int64 [P], equal exactly for patches of one window; a window belongs to one image
    image_ids: int64 [P], index of the patch's image
    rotary_cos, rotary_sin: float32 [P, A], angles of the row, then of the column; both halves of a head use the same
    raster_index: int64 [M], `merged[raster_index]` is the merger's output image after image, in raster order
    grids: (frames, height, width) of each image in patches; frames is 1
    """

    patches: NDArray[np.float32]
    window_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    rotary_cos: NDArray[np.float32]
    rotary_sin: NDArray[np.float32]
    raster_index: NDArray[np.int64]
    grids: tuple[tuple[int, int, int], ...]


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in pixels that the tower takes an image of this size at.

    Both are multiples of `factor`; their product lies within min_pixels .. max_pixels where the aspect allows it
    (transformers image_processing_pil_qwen2_vl.py, `smart_resize`).
    Raises EditError when one side is more than MAX_ASPECT times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise EditError(
            f"The vision tower was given an image of {width} x {height} pixels, but a side may be at most {MAX_ASPECT} "
            "times the other: crop the image."
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

    Equal to what transformers makes of them in `Qwen2VLImageProcessorPil`, then in vision_utils.py,
    `get_vision_window_index` and `get_vision_position_ids`.
    Raises EditError when an image is too narrow.
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

    # A channel has 256 levels. As in the processor they are scaled in float64, rounded, and normalized in float32.
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
    """Rotary angles [P, A] in radians, float32 values (modeling_qwen2_5_vl.py, `Qwen2_5_VLVisionRotaryEmbedding`)."""
    angles = positions_P2[:, :, None].astype(np.float32) * rotary_frequencies(spec.head_dim // 2, spec.rope_theta)
    return angles.reshape(len(positions_P2), -1).astype(np.float64)
