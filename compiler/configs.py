"""A checkpoint's configs as typed dimensions, checked for what the graphs can express.

Sources: the configs of diffusers' QwenImageTransformer2DModel and AutoencoderKLQwenImage, and of transformers'
Qwen2_5_VLForConditionalGeneration (both the flat form of 2025 and the nested one of transformers 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qie.engines.errors import CheckpointError, ExportError

__all__ = ["LanguageConfig", "TransformerConfig", "VaeConfig", "VisionConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Dimensions of the diffusion transformer."""

    layers: int
    heads: int
    head_dim: int
    in_channels: int
    joint_width: int
    axes_dims: tuple[int, int, int]
    zero_cond_t: bool

    @property
    def width(self) -> int:
        """Width of both streams."""
        return self.heads * self.head_dim

    @property
    def modulation_rows(self) -> int:
        """Modulation vectors a block: shift, scale, gate of attention, then of the feed-forward, for noise tokens,
        then (``zero_cond_t``) for reference tokens, then for text tokens."""
        return 18 if self.zero_cond_t else 12

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read transformer/config.json.

        Raises:
            CheckpointError: a key is missing or inconsistent.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "transformer/config.json"
        _refuse(where, config, guidance_embeds=False, use_additional_t_cond=False, use_layer3d_rope=False)
        axes = tuple(int(a) for a in _get(where, config, "axes_dims_rope"))
        result = cls(
            layers=_get(where, config, "num_layers"),
            heads=_get(where, config, "num_attention_heads"),
            head_dim=_get(where, config, "attention_head_dim"),
            in_channels=_get(where, config, "in_channels"),
            joint_width=_get(where, config, "joint_attention_dim"),
            axes_dims=(axes[0], axes[1], axes[2]),
            zero_cond_t=bool(config.get("zero_cond_t", False)),
        )
        if sum(result.axes_dims) != result.head_dim:
            raise CheckpointError(
                f"{where}: axes_dims_rope {list(axes)} adds up to {sum(axes)}, but attention_head_dim is "
                f"{result.head_dim}; the config does not belong to a Qwen-Image transformer"
            )
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """Dimensions of the vision tower."""

    depth: int
    width: int
    heads: int
    intermediate: int
    out_width: int
    patch_width: int
    merge_size: int
    full_attention_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @classmethod
    def from_config(cls, text_encoder: Mapping[str, Any]) -> "VisionConfig":
        """Read the ``vision_config`` of text_encoder/config.json.

        Raises:
            CheckpointError: a key is missing.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "text_encoder/config.json vision_config"
        config = _get("text_encoder/config.json", text_encoder, "vision_config")
        _refuse(where, config, hidden_act="silu")
        channels = config.get("in_channels", config.get("in_chans", 3))
        patch, frames = _get(where, config, "patch_size"), config.get("temporal_patch_size", 2)
        return cls(
            depth=_get(where, config, "depth"),
            width=_get(where, config, "hidden_size"),
            heads=_get(where, config, "num_heads"),
            intermediate=_get(where, config, "intermediate_size"),
            out_width=_get(where, config, "out_hidden_size"),
            patch_width=channels * frames * patch * patch,
            merge_size=config.get("spatial_merge_size", 2),
            full_attention_blocks=tuple(_get(where, config, "fullatt_block_indexes")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Dimensions of the decoder."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @classmethod
    def from_config(cls, text_encoder: Mapping[str, Any]) -> "LanguageConfig":
        """Read the decoder's part of text_encoder/config.json.

        Raises:
            CheckpointError: a key is missing or inconsistent.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "text_encoder/config.json"
        config = {**text_encoder, **text_encoder.get("text_config", {})}
        _refuse(where, config, hidden_act="silu", use_sliding_window=False)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        section = tuple(int(s) for s in rope.get("mrope_section", (16, 24, 24)))
        heads = _get(where, config, "num_attention_heads")
        result = cls(
            layers=_get(where, config, "num_hidden_layers"),
            width=_get(where, config, "hidden_size"),
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            intermediate=_get(where, config, "intermediate_size"),
            vocabulary=_get(where, config, "vocab_size"),
            eps=_get(where, config, "rms_norm_eps"),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 1_000_000.0))),
            mrope_section=(section[0], section[1], section[2]),
        )
        if 2 * sum(section) != result.head_dim:
            raise CheckpointError(
                f"{where}: mrope_section {list(section)} adds up to {sum(section)}, expected half the head width "
                f"({result.head_dim // 2}); the config does not belong to a Qwen2.5-VL text encoder"
            )
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """Dimensions of the VAE."""

    base_width: int
    z_dim: int
    multipliers: tuple[int, ...]
    blocks: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "VaeConfig":
        """Read vae/config.json.

        Raises:
            CheckpointError: a key is missing or inconsistent.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "vae/config.json"
        _refuse(where, config, input_channels=3, attn_scales=[])
        result = cls(
            base_width=_get(where, config, "base_dim"),
            z_dim=_get(where, config, "z_dim"),
            multipliers=tuple(_get(where, config, "dim_mult")),
            blocks=_get(where, config, "num_res_blocks"),
            latents_mean=tuple(_get(where, config, "latents_mean")),
            latents_std=tuple(_get(where, config, "latents_std")),
        )
        for key, values in (("latents_mean", result.latents_mean), ("latents_std", result.latents_std)):
            if len(values) != result.z_dim:
                raise CheckpointError(f"{where}: {key} has {len(values)} values, expected z_dim = {result.z_dim}")
        if len(result.multipliers) != 4:
            raise ExportError(
                f"{where}: dim_mult has {len(result.multipliers)} levels; qie's latents are 1/8 of the image, "
                "which takes 4"
            )
        return result


def _get(where: str, config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"{where} has no {key!r}; download the checkpoint again or restore its config")
    return config[key]


def _refuse(where: str, config: Mapping[str, Any], **expected: Any) -> None:
    """Options that the graphs do not express must be absent or have their usual value."""
    for key, value in expected.items():
        found = config.get(key, value)
        if (found or value) != value:
            raise ExportError(f"{where}: {key} = {found!r} is not supported, qie's graphs are written for {value!r}")
