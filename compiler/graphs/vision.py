"""The vision tower as a graph: Qwen2.5-VL's windowed vision transformer and its patch merger.

Architecture: transformers ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``. Everything that depends only on image sizes
(patch order, windows, rotary tables) is an input, computed by ``qie.engines.inputs.vision``, so no shape depends on
data: window attention is an equality mask over window ids, full attention an equality mask over image ids.

Shape suffixes: P patches, V = P / merge² image tokens, D width, M = merge² * D, E half a head width.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from qie.compiler.checkpoint.configs import VisionConfig
from qie.compiler.graphs.graph import Graph
from qie.compiler.graphs.layers import Linear, RMSNorm, attention, cast, rotate, silu, split
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import TensorSpec

__all__ = ["vision"]

EPS = 1e-6
"""Epsilon of every norm (modeling_qwen2_5_vl.py, Qwen2_5_VLVisionBlock and Qwen2_5_VLPatchMerger)."""


def vision(config: VisionConfig, *, dtype: DType) -> Graph:
    """The graph of the vision tower.

    Inputs: ``patches`` float32 [P, patch width] in window order, ``window_ids`` and ``image_ids`` int64 [P],
    ``rotary_cos`` and ``rotary_sin`` float32 [P, E], ``raster_index`` int64 [V], which restores raster order after the
    merger. Output: ``image_embeds`` float32 [V, width of the language model] in the image processor's order.
    """
    half = config.head_dim // 2
    inputs = (
        TensorSpec(name="patches", dtype="float32", dims=("patches", config.patch_width)),
        TensorSpec(name="window_ids", dtype="int64", dims=("patches",)),
        TensorSpec(name="image_ids", dtype="int64", dims=("patches",)),
        TensorSpec(name="rotary_cos", dtype="float32", dims=("patches", half)),
        TensorSpec(name="rotary_sin", dtype="float32", dims=("patches", half)),
        TensorSpec(name="raster_index", dtype="int64", dims=("image_tokens",)),
    )
    outputs = (TensorSpec(name="image_embeds", dtype="float32", dims=("image_tokens", config.out_width)),)
    return Graph.trace("vision", "text_encoder", dtype, VisionTower(config, dtype), inputs=inputs, outputs=outputs)


class VisionTower(nn.Module):
    """Patch embedding, blocks, merger."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__("visual")
        self.config = config
        self.dtype: DType = dtype
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.ModuleList([Block(config, dtype) for _ in range(config.depth)])
        self.merger = Merger(config, dtype)

    def forward(
        self,
        op: Any,
        patches: ir.Value,
        window_ids_P: ir.Value,
        image_ids_P: ir.Value,
        cos_PE: ir.Value,
        sin_PE: ir.Value,
        raster_index_V: ir.Value,
    ) -> Sequence[ir.Value]:
        window_mask_PP, image_mask_PP = same(op, window_ids_P), same(op, image_ids_P)
        rotary = [op.Unsqueeze(t, [0]) for t in (cos_PE, sin_PE)]
        x_1PD = op.Unsqueeze(self.patch_embed(op, cast(op, patches, "float32", self.dtype)), [0])
        for i, block in enumerate(self.blocks):
            mask_PP = image_mask_PP if i in self.config.full_attention_blocks else window_mask_PP
            x_1PD = block(op, x_1PD, mask_PP, rotary)
        embeds_VD = op.Gather(op.Squeeze(self.merger(op, x_1PD), [0]), raster_index_V, axis=0)
        return (cast(op, embeds_VD, self.dtype, "float32"),)


class PatchEmbed(nn.Module):
    """The patch convolution, whose stride equals its kernel, as a matrix product."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__()
        self.proj = Linear(config.patch_width, config.width, dtype=dtype, bias=False, layout=("flatten", "transpose"))

    def forward(self, op: Any, patches: ir.Value) -> ir.Value:
        return self.proj(op, patches)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, dtype=dtype, eps=EPS)
        self.norm2 = RMSNorm(config.width, dtype=dtype, eps=EPS)
        self.attn = Attention(config, dtype)
        self.mlp = GatedMLP(config, dtype)

    def forward(self, op: Any, x_1PD: ir.Value, mask_PP: ir.Value, rotary: Sequence[ir.Value]) -> ir.Value:
        x_1PD = op.Add(x_1PD, self.attn(op, self.norm1(op, x_1PD), mask_PP, rotary))
        return op.Add(x_1PD, self.mlp(op, self.norm2(op, x_1PD)))


class Attention(nn.Module):
    """Masked self-attention with one projection for query, key and value."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__()
        self.heads = config.heads
        self.dtype: DType = dtype
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype)
        self.proj = Linear(config.width, config.width, dtype=dtype)

    def forward(self, op: Any, x_1PD: ir.Value, mask_PP: ir.Value, rotary: Sequence[ir.Value]) -> ir.Value:
        q, k, v = split(op, self.qkv(op, x_1PD), 3, axis=-1)
        q, k = (rotate(op, t, *rotary, heads=self.heads, dtype=self.dtype, interleaved=False) for t in (q, k))
        return self.proj(op, attention(op, q, k, v, heads=self.heads, mask=mask_PP))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with biases."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.intermediate, dtype=dtype)
        self.up_proj = Linear(config.width, config.intermediate, dtype=dtype)
        self.down_proj = Linear(config.intermediate, config.width, dtype=dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down_proj(op, op.Mul(silu(op, self.gate_proj(op, x)), self.up_proj(op, x)))


class Merger(nn.Module):
    """Norm, then a two-layer MLP that turns merge² neighboring patches into one token of the language model's width."""

    def __init__(self, config: VisionConfig, dtype: DType) -> None:
        super().__init__()
        self.merged = config.width * config.merge_size**2
        self.ln_q = RMSNorm(config.width, dtype=dtype, eps=EPS)
        self.up = Linear(self.merged, self.merged, dtype=dtype, name="mlp.0")
        self.down = Linear(self.merged, config.out_width, dtype=dtype, name="mlp.2")

    def forward(self, op: Any, x_1PD: ir.Value) -> ir.Value:
        merged_1VM = op.Reshape(self.ln_q(op, x_1PD), [0, -1, self.merged])
        return self.down(op, op.Gelu(self.up(op, merged_1VM)))


def same(op: Any, ids_P: ir.Value) -> ir.Value:
    """Bool [P, P], true for two patches with the same id."""
    return op.Equal(op.Unsqueeze(ids_P, [1]), op.Unsqueeze(ids_P, [0]))
