"""The image processor of a checkpoint: what its config and the vision tower's ask the host to do to an image."""

from collections.abc import Mapping
from typing import Any

from qie.engines.bundle.checks import check_vision
from qie.engines.bundle.specs import VisionSpec
from qie.engines.errors import CheckpointError
from qie.engines.records import brief, from_plain

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
                f"preprocessor_config.json: {option} = {brief(processor[option])}, expected {expected!r} for this "
                "vision tower; take both files from the same checkpoint"
            )
    size = processor["size"]
    if not isinstance(size, Mapping):
        raise _malformed("size", size, "shortest_edge and longest_edge")
    size = _PROCESSOR_DEFAULTS["size"] | _present(size)
    rope = tower.get("rope_parameters", {})
    if not isinstance(rope, Mapping):
        raise _malformed("rope_parameters", rope, "an object")
    values = {
        "patch_size": tower["patch_size"],
        "merge_size": tower["spatial_merge_size"],
        "temporal_patch_size": tower["temporal_patch_size"],
        "window_size": tower["window_size"],
        "head_dim": tower.get("head_dim", tower["hidden_size"] // tower["num_heads"]),
        "rope_theta": _present(rope).get("rope_theta", 10000.0),
        "min_pixels": processor.get("min_pixels", size["shortest_edge"]),
        "max_pixels": processor.get("max_pixels", size["longest_edge"]),
        "image_mean": _listed(processor["image_mean"]),
        "image_std": _listed(processor["image_std"]),
    }
    try:
        spec = from_plain(VisionSpec, values)
        check_vision(spec)
    except ValueError as problem:
        raise CheckpointError(
            f"the vision tower or its preprocessor_config.json: {problem}; take the files from the published checkpoint"
        ) from None
    return spec


def _listed(values: Any) -> Any:
    return list(values) if isinstance(values, tuple) else values


def _malformed(option: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"preprocessor_config.json: {option} = {brief(value)}, expected {expected}; take the file from the published "
        "checkpoint"
    )


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
