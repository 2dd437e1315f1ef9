"""The language model as a graph: Qwen2.5-VL's decoder from token ids to the prompt embeddings of the transformer.

Architecture: transformers ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``, Qwen2_5_VLTextModel. ``image_index`` gathers
image embeddings into the prompt. Positions are Qwen2.5-VL's three (frame, height, width), each of which rotates its own
section of a head. The output is the last hidden state after the final norm, without the template's prefix (diffusers
``pipeline_qwenimage_edit_plus.py``, _get_qwen_prompt_embeds). The language head is left out. Attention is causal and
padding is on the right, so padding does not affect real tokens.

Shape suffixes: B batch, S prompt tokens, L = S - 64 text tokens after the prefix, V image tokens, D width, E half a
head width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.graphs.graph import Graph, Parameter, constant
from qie.compiler.graphs.layers import Linear, RMSNorm, attention, cast, rotate, silu
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import TensorSpec
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = ["language"]


def language(config: LanguageConfig, *, dtype: DType) -> Graph:
    """The graph of the language model.

    Inputs: ``input_ids`` int64 [B, S], ``image_embeds`` float32 [V, D], ``image_index`` int64 [B, S] (row of
    ``image_embeds``, or -1 for text), ``position_ids`` int64 [3, B, S].
    Output: ``prompt_embeds`` float32 [B, L, D].
    """
    inputs = (
        TensorSpec(name="input_ids", dtype="int64", dims=("batch", "prompt_tokens")),
        TensorSpec(name="image_embeds", dtype="float32", dims=("image_tokens", config.width)),
        TensorSpec(name="image_index", dtype="int64", dims=("batch", "prompt_tokens")),
        TensorSpec(name="position_ids", dtype="int64", dims=(3, "batch", "prompt_tokens")),
    )
    outputs = (TensorSpec(name="prompt_embeds", dtype="float32", dims=("batch", "text_tokens", config.width)),)
    return Graph.trace("language", "text_encoder", dtype, Decoder(config, dtype), inputs=inputs, outputs=outputs)


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: LanguageConfig, dtype: DType) -> None:
        super().__init__("language_model")
        self.config = config
        self.dtype: DType = dtype
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nn.ModuleList([Layer(config, dtype) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, dtype=dtype, eps=config.eps)

    def forward(
        self,
        op: Any,
        input_ids_BS: ir.Value,
        image_embeds_VD: ir.Value,
        image_index_BS: ir.Value,
        position_ids_3BS: ir.Value,
    ) -> Sequence[ir.Value]:
        rotary = rotary_tables(op, position_ids_3BS, self.config)
        zero = constant(op, 0, "int64")
        image_embeds_VD = cast(op, image_embeds_VD, "float32", self.dtype)
        image_embeds_BSD = op.Gather(image_embeds_VD, op.Max(image_index_BS, zero), axis=0)
        is_text_BS1 = op.Unsqueeze(op.Less(image_index_BS, zero), [-1])  # onnx 1.19 does not infer GreaterOrEqual
        x_BSD = op.Where(is_text_BS1, self.embed_tokens(op, input_ids_BS), image_embeds_BSD)
        for layer in self.layers:
            x_BSD = layer(op, x_BSD, rotary)
        x_BLD = op.Slice(x_BSD, [PREFIX_TOKENS], [2**63 - 1], [1])
        return (cast(op, self.norm(op, x_BLD), self.dtype, "float32"),)


class Embedding(nn.Module):
    """Rows of a table by token id."""

    def __init__(self, config: LanguageConfig, dtype: DType) -> None:
        super().__init__()
        self.weight = Parameter([config.vocabulary, config.width], dtype)

    def forward(self, op: Any, ids: ir.Value) -> ir.Value:
        return op.Gather(self.weight, ids, axis=0)


class Layer(nn.Module):
    """Pre-norm causal attention and SwiGLU feed-forward."""

    def __init__(self, config: LanguageConfig, dtype: DType) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, dtype=dtype, eps=config.eps)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = RMSNorm(config.width, dtype=dtype, eps=config.eps)
        self.mlp = GatedMLP(config, dtype)

    def forward(self, op: Any, x: ir.Value, rotary: Sequence[ir.Value]) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.input_layernorm(op, x), rotary))
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x)))


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, config: LanguageConfig, dtype: DType) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.dtype: DType = dtype
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = Linear(config.width, config.width, dtype=dtype)
        self.k_proj = Linear(config.width, kv_width, dtype=dtype)
        self.v_proj = Linear(config.width, kv_width, dtype=dtype)
        self.o_proj = Linear(config.width, config.width, dtype=dtype, bias=False)

    def forward(self, op: Any, x: ir.Value, rotary: Sequence[ir.Value]) -> ir.Value:
        q = rotate(op, self.q_proj(op, x), *rotary, heads=self.heads, dtype=self.dtype, interleaved=False)
        k = rotate(op, self.k_proj(op, x), *rotary, heads=self.kv_heads, dtype=self.dtype, interleaved=False)
        y = attention(op, q, k, self.v_proj(op, x), heads=self.heads, kv_heads=self.kv_heads, causal=True)
        return self.o_proj(op, y)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: LanguageConfig, dtype: DType) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.intermediate, dtype=dtype, bias=False)
        self.up_proj = Linear(config.width, config.intermediate, dtype=dtype, bias=False)
        self.down_proj = Linear(config.intermediate, config.width, dtype=dtype, bias=False)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down_proj(op, op.Mul(silu(op, self.gate_proj(op, x)), self.up_proj(op, x)))


def rotary_tables(op: Any, position_ids_3BS: ir.Value, config: LanguageConfig) -> Sequence[ir.Value]:
    """Cos and sin float32 [B, S, E]; frequency i turns with the position of its section (mrope_section).

    The sections lie one after the other over half a head: frame, height, width (Qwen2_5_VLRotaryEmbedding).
    """
    axis_E = np.repeat(np.arange(3), config.mrope_section)
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency_E = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    positions_BS3 = op.Transpose(op.Cast(position_ids_3BS, to=ir.DataType.FLOAT), perm=[1, 2, 0])
    angles_BSE = op.Mul(op.Gather(positions_BS3, constant(op, axis_E, "int64"), axis=2), constant(op, frequency_E))
    return op.Cos(angles_BSE), op.Sin(angles_BSE)
