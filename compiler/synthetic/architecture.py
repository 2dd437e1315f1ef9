"""The sizes of a Qwen-Image-Edit model, and the names and shapes of its tensors.

Shapes are PyTorch's: linear [out, in], convolution [out, in, (time,) height, width].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qie.compiler.checkpoint.subfolders import Subfolder

__all__ = ["ARCHITECTURES", "Architecture", "Shape", "tensor_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes of a checkpoint; the defaults are those of the preset "tiny".

    Names are those of the configs of diffusers and transformers, with the prefixes ``text_``, ``vision_`` and ``vae_``.
    Widths are in features.

    Attributes:
        pipeline: "edit" takes one image, "edit_plus" several.
        zero_cond_t: whether reference tokens are modulated at timestep 0, as in 2511.
        vae_area: area in pixels to which the pipeline resizes images for the VAE.
        condition_area: area in pixels to which it resizes images for the vision tower.
        schedule: default steps and guidance of the model; None for the pipeline's.
        text_hidden_size: also the output width of the vision tower and the ``joint_attention_dim`` of the transformer.
        text_vocab_size: rows of the embedding; like the published ones, more than the tokenizer has entries.
        shard_gigabytes: the most that a shard of the transformer holds as published; the text encoder has shards of 5.
        text_names: names of the text encoder's tensors: "old" is ``visual.*`` and ``model.*`` (transformers 4), "new"
            is ``model.visual.*`` and ``model.language_model.*``.
    """

    pipeline: Literal["edit", "edit_plus"] = "edit_plus"
    zero_cond_t: bool = True
    vae_area: int = 128 * 128
    condition_area: int = 128 * 128
    schedule: tuple[int, float] | None = None
    shard_gigabytes: int = 10

    num_layers: int = 2
    num_attention_heads: int = 2
    attention_head_dim: int = 32
    axes_dims_rope: tuple[int, int, int] = (8, 12, 12)
    in_channels: int = 64
    out_channels: int = 16

    text_hidden_size: int = 64
    text_layers: int = 2
    text_heads: int = 2
    text_kv_heads: int = 1
    text_intermediate_size: int = 96
    text_mrope_section: tuple[int, int, int] = (4, 6, 6)
    text_vocab_size: int = 768
    text_names: Literal["old", "new"] = "new"

    vision_depth: int = 2
    vision_hidden_size: int = 32
    vision_heads: int = 2
    vision_intermediate_size: int = 48
    vision_fullatt_block_indexes: tuple[int, ...] = (1,)
    vision_window_size: int = 112
    vision_patch_size: int = 14

    vae_base_dim: int = 8
    vae_dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    vae_num_res_blocks: int = 1
    vae_z_dim: int = 16
    vae_temperal_downsample: tuple[bool, ...] = (False, True, True)


_PUBLISHED = Architecture(
    zero_cond_t=False,
    vae_area=1024 * 1024,
    condition_area=384 * 384,
    num_layers=60,
    num_attention_heads=24,
    attention_head_dim=128,
    axes_dims_rope=(16, 56, 56),
    text_hidden_size=3584,
    text_layers=28,
    text_heads=28,
    text_kv_heads=4,
    text_intermediate_size=18944,
    text_mrope_section=(16, 24, 24),
    text_vocab_size=152064,
    text_names="old",
    vision_depth=32,
    vision_hidden_size=1280,
    vision_heads=16,
    vision_intermediate_size=3420,
    vision_fullatt_block_indexes=(7, 15, 23, 31),
    vae_base_dim=96,
    vae_num_res_blocks=2,
)

ARCHITECTURES: dict[str, Architecture] = {
    "tiny": Architecture(),
    "tiny-2509": Architecture(zero_cond_t=False),
    "tiny-edit": Architecture(pipeline="edit", zero_cond_t=False, text_names="old"),
    "demo": Architecture(
        vae_area=256 * 256,
        condition_area=224 * 224,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=64,
        axes_dims_rope=(8, 28, 28),
        text_hidden_size=256,
        text_layers=4,
        text_heads=4,
        text_kv_heads=2,
        text_intermediate_size=512,
        text_mrope_section=(8, 12, 12),
        vision_depth=4,
        vision_hidden_size=128,
        vision_heads=4,
        vision_intermediate_size=256,
        vision_fullatt_block_indexes=(1, 3),
        vae_base_dim=24,
        vae_num_res_blocks=2,
    ),
    "pocket": Architecture(
        schedule=(4, 1.0),
        condition_area=96 * 96,
        num_layers=5,
        num_attention_heads=3,
        attention_head_dim=64,
        axes_dims_rope=(8, 28, 28),
        text_hidden_size=128,
        text_layers=3,
        text_intermediate_size=256,
        text_mrope_section=(8, 12, 12),
        text_vocab_size=832,
        vision_hidden_size=96,
        vision_heads=3,
        vision_intermediate_size=192,
        vae_base_dim=16,
        vae_num_res_blocks=2,
    ),
    "qwen-image-edit": replace(_PUBLISHED, pipeline="edit", shard_gigabytes=5),
    "qwen-image-edit-2509": _PUBLISHED,
    "qwen-image-edit-2511": replace(_PUBLISHED, zero_cond_t=True),
}
"""Presets by name. "tiny" (like 2511), "tiny-2509" and "tiny-edit" are for tests, "demo" is a larger one for trials,
"pocket" is the trained model of ``recipes/pocket``, and "qwen-image-edit*" have the published sizes (configs of the
model repositories; Qwen2.5-VL-7B for the text encoder)."""


def tensor_shapes(architecture: Architecture) -> dict[Subfolder, dict[str, Shape]]:
    """All tensors of a checkpoint: subfolder -> canonical name (``Weight.name``) -> shape.

    Those of the transformer and the text encoder are in the order of the models' ``state_dict`` in diffusers and
    transformers, which decides what a shard holds.
    """
    return {
        "transformer": dict(_transformer(architecture)),
        "text_encoder": dict(_text_encoder(architecture)),
        "vae": dict(_vae(architecture)),
    }


def _linear(name: str, fan_in: int, fan_out: int, *kernel: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    """A linear layer; with ``kernel`` sizes, a convolution."""
    yield f"{name}.weight", (fan_out, fan_in, *kernel)
    if bias:
        yield f"{name}.bias", (fan_out,)


def _transformer(a: Architecture) -> Iterator[tuple[str, Shape]]:
    width = a.num_attention_heads * a.attention_head_dim
    yield from _linear("time_text_embed.timestep_embedder.linear_1", 256, width)
    yield from _linear("time_text_embed.timestep_embedder.linear_2", width, width)
    yield "txt_norm.weight", (a.text_hidden_size,)
    yield from _linear("img_in", a.in_channels, width)
    yield from _linear("txt_in", a.text_hidden_size, width)
    for layer in range(a.num_layers):
        block = f"transformer_blocks.{layer}"
        yield from _linear(f"{block}.img_mod.1", width, 6 * width)
        yield from _attention(f"{block}.attn", width, a.attention_head_dim)
        yield from _feed_forward(f"{block}.img_mlp", width)
        yield from _linear(f"{block}.txt_mod.1", width, 6 * width)
        yield from _feed_forward(f"{block}.txt_mlp", width)
    yield from _linear("norm_out.linear", width, 2 * width)
    yield from _linear("proj_out", width, 4 * a.out_channels)


def _attention(name: str, width: int, head_dim: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm_q.weight", (head_dim,)
    yield f"{name}.norm_k.weight", (head_dim,)
    for layer in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out"):
        yield from _linear(f"{name}.{layer}", width, width)
    yield f"{name}.norm_added_q.weight", (head_dim,)
    yield f"{name}.norm_added_k.weight", (head_dim,)


def _feed_forward(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.net.0.proj", width, 4 * width)
    yield from _linear(f"{name}.net.2", 4 * width, width)


def _text_encoder(a: Architecture) -> Iterator[tuple[str, Shape]]:
    width, kv_width = a.text_hidden_size, a.text_hidden_size // a.text_heads * a.text_kv_heads
    yield from _vision(a)
    yield "language_model.embed_tokens.weight", (a.text_vocab_size, width)
    for layer in range(a.text_layers):
        block = f"language_model.layers.{layer}"
        yield from _linear(f"{block}.self_attn.q_proj", width, width)
        yield from _linear(f"{block}.self_attn.k_proj", width, kv_width)
        yield from _linear(f"{block}.self_attn.v_proj", width, kv_width)
        yield from _linear(f"{block}.self_attn.o_proj", width, width, bias=False)
        yield from _gated(f"{block}.mlp", width, a.text_intermediate_size, bias=False)
        yield f"{block}.input_layernorm.weight", (width,)
        yield f"{block}.post_attention_layernorm.weight", (width,)
    yield "language_model.norm.weight", (width,)
    yield "lm_head.weight", (a.text_vocab_size, width)


def _vision(a: Architecture) -> Iterator[tuple[str, Shape]]:
    vision, merged = a.vision_hidden_size, 4 * a.vision_hidden_size
    yield from _linear("visual.patch_embed.proj", 3, vision, 2, a.vision_patch_size, a.vision_patch_size, bias=False)
    for layer in range(a.vision_depth):
        block = f"visual.blocks.{layer}"
        yield f"{block}.norm1.weight", (vision,)
        yield f"{block}.norm2.weight", (vision,)
        yield from _linear(f"{block}.attn.qkv", vision, 3 * vision)
        yield from _linear(f"{block}.attn.proj", vision, vision)
        yield from _gated(f"{block}.mlp", vision, a.vision_intermediate_size, bias=True)
    yield "visual.merger.ln_q.weight", (vision,)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", merged, a.text_hidden_size)


def _gated(name: str, width: int, inner: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.gate_proj", width, inner, bias=bias)
    yield from _linear(f"{name}.up_proj", width, inner, bias=bias)
    yield from _linear(f"{name}.down_proj", inner, width, bias=bias)


def _vae(a: Architecture) -> Iterator[tuple[str, Shape]]:
    widths = [a.vae_base_dim * multiple for multiple in a.vae_dim_mult]
    top, last = widths[-1], len(widths) - 1
    yield from _linear("quant_conv", 2 * a.vae_z_dim, 2 * a.vae_z_dim, 1, 1, 1)
    yield from _linear("post_quant_conv", a.vae_z_dim, a.vae_z_dim, 1, 1, 1)

    yield from _linear("encoder.conv_in", 3, a.vae_base_dim, 3, 3, 3)
    below, index = a.vae_base_dim, 0
    for level, width in enumerate(widths):
        for _ in range(a.vae_num_res_blocks):
            yield from _residual(f"encoder.down_blocks.{index}", below, width)
            below, index = width, index + 1
        if level < last:
            yield from _linear(f"encoder.down_blocks.{index}.resample.1", width, width, 3, 3)
            if a.vae_temperal_downsample[level]:
                yield from _linear(f"encoder.down_blocks.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    yield from _middle("encoder.mid_block", top)
    yield "encoder.norm_out.gamma", (top, 1, 1, 1)
    yield from _linear("encoder.conv_out", top, 2 * a.vae_z_dim, 3, 3, 3)

    yield from _linear("decoder.conv_in", a.vae_z_dim, top, 3, 3, 3)
    yield from _middle("decoder.mid_block", top)
    below = top
    for level, width in enumerate(reversed(widths)):
        for index in range(a.vae_num_res_blocks + 1):
            yield from _residual(f"decoder.up_blocks.{level}.resnets.{index}", below, width)
            below = width
        if level < last:
            upsampler = f"decoder.up_blocks.{level}.upsamplers.0"
            yield from _linear(f"{upsampler}.resample.1", width, width // 2, 3, 3)
            if a.vae_temperal_downsample[::-1][level]:
                yield from _linear(f"{upsampler}.time_conv", width, 2 * width, 3, 1, 1)
            below = width // 2
    yield "decoder.norm_out.gamma", (widths[0], 1, 1, 1)
    yield from _linear("decoder.conv_out", widths[0], 3, 3, 3, 3)


def _residual(name: str, below: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm1.gamma", (below, 1, 1, 1)
    yield from _linear(f"{name}.conv1", below, width, 3, 3, 3)
    yield f"{name}.norm2.gamma", (width, 1, 1, 1)
    yield from _linear(f"{name}.conv2", width, width, 3, 3, 3)
    if below != width:
        yield from _linear(f"{name}.conv_shortcut", below, width, 1, 1, 1)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _residual(f"{name}.resnets.0", width, width)
    yield f"{name}.attentions.0.norm.gamma", (width, 1, 1)
    yield from _linear(f"{name}.attentions.0.to_qkv", width, 3 * width, 1, 1)
    yield from _linear(f"{name}.attentions.0.proj", width, width, 1, 1)
    yield from _residual(f"{name}.resnets.1", width, width)
