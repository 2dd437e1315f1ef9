"""A checkpoint's configs as typed dimensions, checked for what the graphs can express.

Sources: the configs of diffusers' QwenImageTransformer2DModel and AutoencoderKLQwenImage, and of transformers'
Qwen2_5_VLForConditionalGeneration (both the flat form of 2025 and the nested one of transformers 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qie.engines.bundle import modulation_rows
from qie.engines.errors import CheckpointError, ExportError
from qie.engines.records import brief, is_number

__all__ = ["LARGEST", "MOST_LAYERS", "LanguageConfig", "TransformerConfig", "VaeConfig", "VisionConfig"]

LARGEST = 1 << 16
"""Largest width, or number of heads: twenty times the width of the published transformer."""

MOST_LAYERS = 1000
"""Most layers of a component; the published transformer has 60."""


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
        """Rows of a block's modulation (``qie.engines.bundle.modulation_rows``)."""
        return modulation_rows.rows(references=self.zero_cond_t)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read transformer/config.json.

        Raises:
            CheckpointError: a key is missing or inconsistent.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "transformer/config.json"
        _refuse(where, config, guidance_embeds=False, use_additional_t_cond=False, use_layer3d_rope=False)
        axes = _counts(where, config, "axes_dims_rope", 3)
        result = cls(
            layers=_count(where, config, "num_layers", most=MOST_LAYERS),
            heads=_count(where, config, "num_attention_heads"),
            head_dim=_count(where, config, "attention_head_dim"),
            in_channels=_count(where, config, "in_channels"),
            joint_width=_count(where, config, "joint_attention_dim"),
            axes_dims=(axes[0], axes[1], axes[2]),
            zero_cond_t=bool(config.get("zero_cond_t", False)),
        )
        if result.width > LARGEST:
            raise _wrong(where, "num_attention_heads * attention_head_dim", result.width, f"at most {LARGEST}")
        if sum(result.axes_dims) != result.head_dim:
            raise CheckpointError(
                f"{where}: axes_dims_rope {list(axes)} adds up to {sum(axes)}, expected "
                f"attention_head_dim = {result.head_dim}; restore the config of a Qwen-Image transformer"
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
            CheckpointError: a key is missing or inconsistent.
            ExportError: the model uses an option that the graph does not express.
        """
        where = "text_encoder/config.json vision_config"
        config = _table("text_encoder/config.json", text_encoder, "vision_config")
        _refuse(where, config, hidden_act="silu")
        channels = _count(where, config, "in_channels" if "in_channels" in config else "in_chans", 3)
        patch = _count(where, config, "patch_size", most=1024)
        frames = _count(where, config, "temporal_patch_size", 2, most=64)
        result = cls(
            depth=_count(where, config, "depth", most=MOST_LAYERS),
            width=_count(where, config, "hidden_size"),
            heads=_count(where, config, "num_heads"),
            intermediate=_count(where, config, "intermediate_size"),
            out_width=_count(where, config, "out_hidden_size"),
            patch_width=channels * frames * patch * patch,
            merge_size=_count(where, config, "spatial_merge_size", 2, most=64),
            full_attention_blocks=_counts(where, config, "fullatt_block_indexes", least=0),
        )
        _divides(where, "num_heads", result.heads, result.width)
        return result


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
        config = {**text_encoder, **_table(where, text_encoder, "text_config")}
        _refuse(where, config, hidden_act="silu", use_sliding_window=False)
        rope = _table(where, config, "rope_parameters") or _table(where, config, "rope_scaling")
        section = _counts(where, {"mrope_section": (16, 24, 24), **rope}, "mrope_section", 3)
        heads = _count(where, config, "num_attention_heads")
        result = cls(
            layers=_count(where, config, "num_hidden_layers", most=MOST_LAYERS),
            width=_count(where, config, "hidden_size"),
            heads=heads,
            kv_heads=_count(where, config, "num_key_value_heads", heads),
            intermediate=_count(where, config, "intermediate_size"),
            vocabulary=_count(where, config, "vocab_size", most=1 << 24),
            eps=_number(where, config, "rms_norm_eps", 1e-12, 1),
            rope_theta=_number(where, {"rope_theta": 1_000_000.0, **config, **rope}, "rope_theta", 1, 1e12),
            mrope_section=(section[0], section[1], section[2]),
        )
        _divides(where, "num_attention_heads", result.heads, result.width)
        _divides(where, "num_key_value_heads", result.kv_heads, result.heads)
        if 2 * sum(section) != result.head_dim:
            raise CheckpointError(
                f"{where}: mrope_section {list(section)} adds up to {sum(section)}, expected half the head width "
                f"({result.head_dim // 2}); restore the config of a Qwen2.5-VL text encoder"
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
            base_width=_count(where, config, "base_dim"),
            z_dim=_count(where, config, "z_dim"),
            multipliers=_counts(where, config, "dim_mult"),
            blocks=_count(where, config, "num_res_blocks", most=100),
            latents_mean=_numbers(where, config, "latents_mean", -1000, 1000),
            latents_std=_numbers(where, config, "latents_std", 1e-3, 1000),
        )
        for key, values in (("latents_mean", result.latents_mean), ("latents_std", result.latents_std)):
            if len(values) != result.z_dim:
                raise CheckpointError(
                    f"{where}: {key} has {len(values)} values, expected z_dim = {result.z_dim}; restore the config"
                )
        if len(result.multipliers) != 4:
            raise ExportError(
                f"{where}: dim_mult has {len(result.multipliers)} levels, expected 4 for latents of 1/8 "
                "of the image; use a checkpoint of Qwen-Image-Edit"
            )
        return result


def _get(where: str, config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"{where} has no {key!r}; restore the checkpoint's config")
    return config[key]


def _wrong(where: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{where}: {key} = {brief(value)}, expected {expected}; restore the checkpoint's config")


def _table(where: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object; absent or null is empty."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise _wrong(where, key, value, "an object")
    return value


def _count(where: str, config: Mapping[str, Any], key: str, default: int | None = None, *, most: int = LARGEST) -> int:
    """A whole number from 1 to ``most``; absent or null is the default, where there is one."""
    value = config.get(key) or default if default is not None else _get(where, config, key)
    if type(value) is not int or not 1 <= value <= most:
        raise _wrong(where, key, value, f"a whole number from 1 to {most}")
    return value


def _counts(
    where: str, config: Mapping[str, Any], key: str, length: int | None = None, *, least: int = 1
) -> tuple[int, ...]:
    value = _get(where, config, key)
    if (
        not isinstance(value, list | tuple)
        or not all(type(count) is int and least <= count <= MOST_LAYERS for count in value)
        or len(value) != (length or len(value))
        or len(value) > MOST_LAYERS
    ):
        expected = f"a list of {length or 'some'} whole numbers from {least} to {MOST_LAYERS}"
        raise _wrong(where, key, value, expected)
    return tuple(value)


def _number(where: str, config: Mapping[str, Any], key: str, least: float, most: float) -> float:
    value = _get(where, config, key)
    if not is_number(value) or not least <= value <= most:
        raise _wrong(where, key, value, f"a number from {least:g} to {most:g}")
    return float(value)


def _numbers(where: str, config: Mapping[str, Any], key: str, least: float, most: float) -> tuple[float, ...]:
    value = _get(where, config, key)
    if not isinstance(value, list | tuple):
        raise _wrong(where, key, value, "a list of numbers")
    return tuple(_number(where, {key: number}, key, least, most) for number in value)


def _divides(where: str, key: str, part: int, whole: int) -> None:
    if whole % part:
        raise _wrong(where, key, part, f"a divisor of {whole}")


def _refuse(where: str, config: Mapping[str, Any], **expected: Any) -> None:
    """Options that the graphs do not express must be absent or have their usual value."""
    for key, usual in expected.items():
        value = config.get(key, usual)
        if (value or usual) != usual:
            raise ExportError(
                f"{where}: {key} = {brief(value)} is not supported, the graphs are written for {usual!r}; use a "
                "checkpoint of Qwen-Image-Edit"
            )
