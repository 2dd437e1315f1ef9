"""The transformer as a graph: one denoising step of Qwen-Image-Edit's double-stream diffusion transformer.

Architecture: diffusers ``models/transformers/transformer_qwenimage.py``; guidance and step: diffusers
``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` and ``schedulers/scheduling_flow_match_euler_discrete.py``.
What leaves the graph, and what enters it:

- The timestep embedder, ``img_mod``, ``txt_mod`` and ``norm_out.linear`` depend on the timestep alone. Their outputs
  are inputs here (``modulation``, ``modulation_out``), made by ``qie.engines.inputs.modulation``.
- Guidance with its norm rescale and the Euler update are in the graph. A pass without guidance takes zeros as
  ``negative_velocity`` and 1 as ``guidance``, which leaves its velocity exactly as it is.
- In the last block only the noise tokens go on: their queries, attention rows and feed-forward are computed, the
  references' and the text's are not.

Shape suffixes: B batch, N noise tokens, R reference tokens, T = N + R, L text tokens, S = L + T, D width,
F = 4 D, C = 64 latent channels of a token, E half a head width.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.graphs.graph import Graph, constant
from qie.compiler.graphs.layers import Linear, RMSNorm, attention, cast, rotate, split
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import TensorSpec

__all__ = ["transformer"]

EPS = 1e-6
"""Epsilon of every norm (transformer_qwenimage.py, QwenImageTransformerBlock)."""

Modulation = tuple[ir.Value, ir.Value, ir.Value]
"""shift, gain (1 + scale) and gate, [D] each."""


def transformer(config: TransformerConfig, *, dtype: DType) -> Graph:
    """The graph of one step; contract in DESIGN: ``latents`` and ``reference`` in, ``velocity`` and next latents out.

    Inputs (float32): ``latents`` [B, N, C], ``reference`` [B, R, C], ``prompt_embeds`` [B, L, joint width],
    ``rotary_cos`` and ``rotary_sin`` [S, E] in the order text, noise, references, ``modulation`` [layers, rows * D]
    and ``modulation_out`` [2 * D] of this step's timestep, ``negative_velocity`` [B, N, C], ``guidance`` [1],
    ``dsigma`` [1] (next sigma minus this one). Outputs (float32): ``velocity`` [B, N, C] of this pass alone and
    ``latents_next`` [B, N, C].
    """
    c, d = config.in_channels, config.width
    inputs = (
        TensorSpec(name="latents", dtype="float32", dims=("batch", "noise_tokens", c)),
        TensorSpec(name="reference", dtype="float32", dims=("batch", "reference_tokens", c)),
        TensorSpec(name="prompt_embeds", dtype="float32", dims=("batch", "text_tokens", config.joint_width)),
        TensorSpec(name="rotary_cos", dtype="float32", dims=("tokens", config.head_dim // 2)),
        TensorSpec(name="rotary_sin", dtype="float32", dims=("tokens", config.head_dim // 2)),
        TensorSpec(name="modulation", dtype="float32", dims=(config.layers, config.modulation_rows * d)),
        TensorSpec(name="modulation_out", dtype="float32", dims=(2 * d,)),
        TensorSpec(name="negative_velocity", dtype="float32", dims=("batch", "noise_tokens", c)),
        TensorSpec(name="guidance", dtype="float32", dims=(1,)),
        TensorSpec(name="dsigma", dtype="float32", dims=(1,)),
    )
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", dims=("batch", "noise_tokens", c))
        for name in ("velocity", "latents_next")
    )
    return Graph.trace("transformer", "transformer", dtype, Transformer(config, dtype), inputs=inputs, outputs=outputs)


class Transformer(nn.Module):
    """Embeds both streams, runs the blocks, projects the noise tokens, and takes the step."""

    def __init__(self, config: TransformerConfig, dtype: DType) -> None:
        super().__init__("")
        self.config = config
        self.dtype: DType = dtype
        self.img_in = Linear(config.in_channels, config.width, dtype=dtype)
        self.txt_norm = RMSNorm(config.joint_width, dtype=dtype, eps=EPS)
        self.txt_in = Linear(config.joint_width, config.width, dtype=dtype)
        self.transformer_blocks = nn.ModuleList([Block(config, dtype, number) for number in range(config.layers)])
        self.proj_out = Linear(config.width, config.in_channels, dtype=dtype)

    def forward(
        self,
        op: Any,
        latents_BNC: ir.Value,
        reference_BRC: ir.Value,
        prompt_embeds_BLJ: ir.Value,
        cos_SE: ir.Value,
        sin_SE: ir.Value,
        modulation: ir.Value,
        modulation_out: ir.Value,
        negative_BNC: ir.Value,
        guidance_1: ir.Value,
        dsigma_1: ir.Value,
    ) -> Sequence[ir.Value]:
        config, dtype = self.config, self.dtype
        tokens = Tokens(op, latents_BNC, prompt_embeds_BLJ, reference_BRC)
        rotary = tuple(op.Expand(op.Unsqueeze(t, [0]), tokens.batch_11) for t in (cos_SE, sin_SE))
        rows = cast(op, modulation, "float32", dtype)
        out_gain_shift = cast(op, modulation_out, "float32", dtype)

        image_BTD = self.img_in(op, cast(op, op.Concat(latents_BNC, reference_BRC, axis=1), "float32", dtype))
        text_BLD = self.txt_in(op, self.txt_norm(op, cast(op, prompt_embeds_BLJ, "float32", dtype)))
        for i, block in enumerate(self.transformer_blocks):
            image_BTD, text_BLD = block(op, image_BTD, text_BLD, rows, rotary, tokens, last=i == config.layers - 1)
        gain, shift = split(op, out_gain_shift, 2, axis=0)
        noise_BND = modulated_norm(op, image_BTD, shift, gain)
        velocity_BNC = cast(op, self.proj_out(op, noise_BND), dtype, "float32")
        return velocity_BNC, euler_step(op, latents_BNC, velocity_BNC, negative_BNC, guidance_1, dsigma_1)


class Tokens:
    """Token counts and the mask that tells references from noise, computed once."""

    def __init__(self, op: Any, latents_BNC: ir.Value, prompt_BLJ: ir.Value, reference_BRC: ir.Value) -> None:
        self.noise = op.Shape(latents_BNC, start=1, end=2)
        self.text = op.Shape(prompt_BLJ, start=1, end=2)
        references = op.Shape(reference_BRC, start=1, end=2)
        self.batch_11 = op.Concat(op.Shape(latents_BNC, start=0, end=1), [1, 1], axis=0)
        total = op.Squeeze(op.Add(self.noise, references))
        index_T1 = op.Unsqueeze(op.Range(constant(op, 0, "int64"), total, constant(op, 1, "int64")), [1])
        self.is_noise_T1 = op.Less(index_T1, self.noise)

    def of_noise(self, op: Any, x_BTD: ir.Value) -> ir.Value:
        """The noise tokens of an image stream."""
        return op.Slice(x_BTD, [0], self.noise, [1])

    def of_references(self, op: Any, x_BTD: ir.Value) -> ir.Value:
        """The reference tokens of an image stream."""
        return op.Slice(x_BTD, self.noise, [INT64_MAX], [1])


INT64_MAX = 2**63 - 1
"""Slice's word for "to the end"."""


class Block(nn.Module):
    """One double-stream block: joint attention and a feed-forward a stream, each modulated by the timestep."""

    def __init__(self, config: TransformerConfig, dtype: DType, number: int) -> None:
        super().__init__()
        self.config = config
        self.dtype: DType = dtype
        self.number = number
        self.attn = JointAttention(config, dtype)
        self.img_mlp = FeedForward(config.width, dtype)
        self.txt_mlp = FeedForward(config.width, dtype)

    def forward(
        self,
        op: Any,
        image_BTD: ir.Value,
        text_BLD: ir.Value,
        rows: ir.Value,
        rotary: tuple[ir.Value, ir.Value],
        tokens: Tokens,
        *,
        last: bool,
    ) -> tuple[ir.Value, ir.Value]:
        row = op.Gather(rows, constant(op, self.number, "int64"), axis=0)
        noise, references, text = self.modulations(op, row)
        image = self.normed_image(op, image_BTD, noise[0], references[0], tokens)
        words = self.normed(op, text_BLD, text[0])
        image, words = self.attn(op, image, words, rotary, tokens, last=last)
        if last:
            noise_BND = op.Add(tokens.of_noise(op, image_BTD), op.Mul(noise[0][2], image))
            hidden = self.img_mlp(op, self.normed(op, noise_BND, noise[1]))
            return op.Add(noise_BND, op.Mul(noise[1][2], hidden)), text_BLD

        image_BTD = op.Add(image_BTD, op.Mul(self.gate(op, noise[0], references[0], tokens), image))
        text_BLD = op.Add(text_BLD, op.Mul(text[0][2], words))
        image = self.img_mlp(op, self.normed_image(op, image_BTD, noise[1], references[1], tokens))
        image_BTD = op.Add(image_BTD, op.Mul(self.gate(op, noise[1], references[1], tokens), image))
        words = self.txt_mlp(op, self.normed(op, text_BLD, text[1]))
        return image_BTD, op.Add(text_BLD, op.Mul(text[1][2], words))

    def modulations(self, op: Any, row: ir.Value) -> Sequence[Sequence[Modulation]]:
        """(attention, feed-forward) modulation of noise, references and text; order of rows: TransformerConfig."""
        values = split(op, row, self.config.modulation_rows, axis=0)
        triples = [(values[i], values[i + 1], values[i + 2]) for i in range(0, len(values), 3)]
        streams = [triples[i : i + 2] for i in range(0, len(triples), 2)]
        return streams if self.config.zero_cond_t else (streams[0], streams[0], streams[1])

    def normed(self, op: Any, x_BSD: ir.Value, modulation: Modulation) -> ir.Value:
        return modulated_norm(op, x_BSD, modulation[0], modulation[1])

    def normed_image(
        self, op: Any, x_BTD: ir.Value, noise: Modulation, references: Modulation, tokens: Tokens
    ) -> ir.Value:
        if not self.config.zero_cond_t:
            return self.normed(op, x_BTD, noise)
        parts = (
            self.normed(op, tokens.of_noise(op, x_BTD), noise),
            self.normed(op, tokens.of_references(op, x_BTD), references),
        )
        return op.Concat(*parts, axis=1)

    def gate(self, op: Any, noise: Modulation, references: Modulation, tokens: Tokens) -> ir.Value:
        if not self.config.zero_cond_t:
            return noise[2]
        return op.Where(tokens.is_noise_T1, noise[2], references[2])


class JointAttention(nn.Module):
    """Attention over text and image together: separate projections and norms, one softmax."""

    def __init__(self, config: TransformerConfig, dtype: DType) -> None:
        super().__init__()
        d, k = config.width, config.head_dim
        self.config = config
        self.dtype: DType = dtype
        self.to_q = Linear(d, d, dtype=dtype)
        self.to_k = Linear(d, d, dtype=dtype)
        self.to_v = Linear(d, d, dtype=dtype)
        self.add_q_proj = Linear(d, d, dtype=dtype)
        self.add_k_proj = Linear(d, d, dtype=dtype)
        self.add_v_proj = Linear(d, d, dtype=dtype)
        self.norm_q = RMSNorm(k, dtype=dtype, eps=EPS)
        self.norm_k = RMSNorm(k, dtype=dtype, eps=EPS)
        self.norm_added_q = RMSNorm(k, dtype=dtype, eps=EPS)
        self.norm_added_k = RMSNorm(k, dtype=dtype, eps=EPS)
        self.to_out = Linear(d, d, dtype=dtype, name="to_out.0")
        self.to_add_out = Linear(d, d, dtype=dtype)

    def forward(
        self,
        op: Any,
        image_BTD: ir.Value,
        text_BLD: ir.Value,
        rotary: tuple[ir.Value, ir.Value],
        tokens: Tokens,
        *,
        last: bool,
    ) -> tuple[ir.Value, ir.Value]:
        """(image, text) after attention and output projection; in the last block noise tokens alone, text unused."""
        key = op.Concat(
            self.heads(op, self.add_k_proj(op, text_BLD), self.norm_added_k),
            self.heads(op, self.to_k(op, image_BTD), self.norm_k),
            axis=1,
        )
        value = op.Concat(self.add_v_proj(op, text_BLD), self.to_v(op, image_BTD), axis=1)
        if last:
            query = self.heads(op, self.to_q(op, tokens.of_noise(op, image_BTD)), self.norm_q)
            end = op.Add(tokens.text, tokens.noise)
            query_rotary = tuple(op.Slice(t, tokens.text, end, [1]) for t in rotary)
        else:
            query = op.Concat(
                self.heads(op, self.add_q_proj(op, text_BLD), self.norm_added_q),
                self.heads(op, self.to_q(op, image_BTD), self.norm_q),
                axis=1,
            )
            query_rotary = rotary
        heads, dtype = self.config.heads, self.dtype
        query = rotate(op, query, *query_rotary, heads=heads, dtype=dtype, interleaved=True)
        key = rotate(op, key, *rotary, heads=heads, dtype=dtype, interleaved=True)
        joint = attention(op, query, key, value, heads=heads)
        if last:
            return self.to_out(op, joint), text_BLD
        words = op.Slice(joint, [0], tokens.text, [1])
        image = op.Slice(joint, tokens.text, [INT64_MAX], [1])
        return self.to_out(op, image), self.to_add_out(op, words)

    def heads(self, op: Any, x_BSD: ir.Value, norm: RMSNorm) -> ir.Value:
        """Norm over each head's width."""
        by_head = op.Reshape(x_BSD, [0, 0, self.config.heads, self.config.head_dim])
        return op.Reshape(norm(op, by_head), [0, 0, self.config.width])


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.up = Linear(width, 4 * width, dtype=dtype, name="net.0.proj")
        self.down = Linear(4 * width, width, dtype=dtype, name="net.2")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down(op, op.Gelu(self.up(op, x), approximate="tanh"))


def modulated_norm(op: Any, x: ir.Value, shift: ir.Value, gain: ir.Value) -> ir.Value:
    """LayerNorm(x) * gain + shift, as one LayerNormalization whose weight and bias are the modulation."""
    return op.LayerNormalization(x, gain, shift, axis=-1, epsilon=EPS)


def euler_step(
    op: Any, latents_BNC: ir.Value, velocity: ir.Value, negative: ir.Value, guidance: ir.Value, dsigma: ir.Value
) -> ir.Value:
    """Latents + dsigma * guided velocity, the guided velocity rescaled per token to the norm of the conditional one."""
    guided = op.Add(negative, op.Mul(guidance, op.Sub(velocity, negative)))
    norms = [op.ReduceL2(v, [-1], keepdims=1) for v in (velocity, guided)]
    tiny = constant(op, 1e-30)
    rescaled = op.Mul(guided, op.Div(norms[0], op.Max(norms[1], tiny)))
    return op.Add(latents_BNC, op.Mul(dsigma, rescaled))
