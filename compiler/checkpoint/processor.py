"""The image processor of a checkpoint: what its config and the vision tower's ask the host to do to an image."""

from collections.abc import Mapping
from typing import Any

from qie.engines.bundle.specs import VisionSpec
from qie.engines.errors import CheckpointError
from qie.engines.records import is_number

__all__ = ["parse_processor"]

_VISION_DEFAULTS: dict[str, Any] = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "hidden_size": 3584,
    "num_heads": 16,
}
"""transformers configuration_qwen2_5_vl.py, ``Qwen2_5_VLVisionConfig``."""

_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,  # PIL.Image.Resampling.BICUBIC
    "rescale_factor": 1 / 255,
}
"""Options of the image processor that must have these values (``inputs.vision``)."""

_PROCESSOR_DEFAULTS: dict[str, Any] = _FIXED | {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
}
"""transformers image_processing_pil_qwen2_vl.py, ``Qwen2VLImageProcessorPil``; mean and std are those of CLIP."""


def parse_processor(vision_config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionSpec:
    """The spec in ``vision_config`` of text_encoder/config.json and in preprocessor_config.json, both parsed.

    Absent or null options take the defaults of transformers. The limits are ``min_pixels`` and ``max_pixels`` or, where
    those are missing, ``shortest_edge`` and ``longest_edge`` of ``size`` (areas, in spite of their names).

    Raises:
        CheckpointError: the processor does not fit the tower, or prepares images in a way that qie does not follow.
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
                f"preprocessor_config.json: {option} = {processor[option]!r}, expected {expected!r} for this vision "
                "tower; take both files from the same checkpoint"
            )
    size = processor["size"]
    if not isinstance(size, Mapping):
        raise _malformed("size", size, "shortest_edge and longest_edge")
    size = _PROCESSOR_DEFAULTS["size"] | _present(size)
    min_pixels = processor.get("min_pixels", size["shortest_edge"])
    max_pixels = processor.get("max_pixels", size["longest_edge"])
    if not (is_number(min_pixels) and is_number(max_pixels) and 0 < min_pixels <= max_pixels):
        raise _malformed(
            "min_pixels and max_pixels", (min_pixels, max_pixels), "two areas in pixels, the smaller one first"
        )
    for option in ("image_mean", "image_std"):
        values = processor[option]
        numbers = isinstance(values, list | tuple) and len(values) == 3 and all(map(is_number, values))
        if not numbers or (option == "image_std" and min(values) <= 0):
            raise _malformed(option, values, "one number for each of 3 channels")
    return VisionSpec(
        patch_size=tower["patch_size"],
        merge_size=tower["spatial_merge_size"],
        temporal_patch_size=tower["temporal_patch_size"],
        window_size=tower["window_size"],
        head_dim=tower.get("head_dim", tower["hidden_size"] // tower["num_heads"]),
        rope_theta=float(tower.get("rope_parameters", {}).get("rope_theta", 10000.0)),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_mean=tuple(processor["image_mean"]),
        image_std=tuple(processor["image_std"]),
    )


def _malformed(option: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"preprocessor_config.json: {option} = {value!r}, expected {expected}; take the file from the published "
        "checkpoint"
    )


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
