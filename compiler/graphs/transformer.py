"""The transformer as a graph: one denoising step of Qwen-Image-Edit's double-stream diffusion transformer.

Architecture: diffusers ``models/transformers/transformer_qwenimage.py``. Guidance and step: diffusers
``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` and ``schedulers/scheduling_flow_match_euler_discrete.py``.
The graph differs from the reference in three ways (docs/graphs.md):

- The timestep embedder, ``img_mod``, ``txt_mod`` and ``norm_out.linear`` depend only on the timestep. Their outputs are
  inputs (``modulation``, ``modulation_out``), computed by ``qie.engines.inputs.modulation`` for every step of a
  schedule; ``step`` names the one that each image of the batch is at.
- Guidance with its norm rescale and the Euler step are part of the graph. A pass without guidance takes zeros as
  ``negative_velocity`` and 1 as ``guidance``, which leaves its velocity unchanged.
- The last block computes queries, attention rows and feed-forward only for noise tokens.

Shape suffixes: B batch, N noise tokens, R reference tokens, T = N + R, L text tokens, S = L + T, D width, J width of
the prompt embeddings, C = 64 latent channels of a token, E half a head width, K blocks, P steps of a schedule, M = rows
* D modulation values of a block.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import onnx_ir as ir
from onnxscript import nn

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.graphs.graph import Graph, constant
from qie.compiler.graphs.layers import INT64_MAX, HeadNorm, Linear, RMSNorm, attention, cast, norm_and_rotate, split
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import TensorSpec
from qie.engines.bundle.modulation_rows import HALVES, KINDS, streams

__all__ = ["transformer"]

EPS = 1e-6
"""Epsilon of every norm (transformer_qwenimage.py, QwenImageTransformerBlock)."""


class Modulation(NamedTuple):
    """How the timestep modulates one branch of a block.

    Attributes:
        shift: [B, 1, D], added to the normalized input.
        gain: [B, 1, D], factor of the normalized input: 1 + the reference's scale.
        gate: [B, 1, D], factor of the branch's output before it is added to the residual.
    """

    shift: ir.Value
    gain: ir.Value
    gate: ir.Value


class StreamModulation(NamedTuple):
    """The modulation of one stream of tokens: of its attention branch and of its feed-forward branch."""

    attention: Modulation
    mlp: Modulation


def transformer(config: TransformerConfig, *, dtype: DType) -> Graph:
    """The graph of one step, whose contract docs/graphs.md states.

    Inputs (float32): ``latents`` [B, N, C], ``reference`` [B, R, C], ``prompt_embeds`` [B, L, J], ``rotary_cos`` and
    ``rotary_sin`` [S, E] in the order text, noise, references, ``modulation`` [P * K, M], ``modulation_out`` [P, 2 * D]
    and ``dsigma`` [P] (next sigma minus that of the step) of every step, ``negative_velocity`` [B, N, C] and
    ``guidance`` [B]; and ``step`` [B], int64. A graph in bfloat16 takes its modulation in that. Outputs (float32):
    ``velocity`` [B, N, C] before guidance, and ``latents_next`` [B, N, C].
    """
    c, d = config.in_channels, config.width
    tables: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "bfloat16" else "float32"
    inputs = (
        TensorSpec(name="latents", dtype="float32", dims=("batch", "noise_tokens", c)),
        TensorSpec(name="reference", dtype="float32", dims=("batch", "reference_tokens", c)),
        TensorSpec(name="prompt_embeds", dtype="float32", dims=("batch", "text_tokens", config.joint_width)),
        TensorSpec(name="rotary_cos", dtype="float32", dims=("tokens", config.head_dim // 2)),
        TensorSpec(name="rotary_sin", dtype="float32", dims=("tokens", config.head_dim // 2)),
        TensorSpec(name="modulation", dtype=tables, dims=("steps_of_blocks", config.modulation_rows * d)),
        TensorSpec(name="modulation_out", dtype=tables, dims=("steps", 2 * d)),
        TensorSpec(name="dsigma", dtype="float32", dims=("steps",)),
        TensorSpec(name="step", dtype="int64", dims=("batch",)),
        TensorSpec(name="negative_velocity", dtype="float32", dims=("batch", "noise_tokens", c)),
        TensorSpec(name="guidance", dtype="float32", dims=("batch",)),
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
        modulation_RM: ir.Value,
        modulation_out_PO: ir.Value,
        dsigma_P: ir.Value,
        step_B: ir.Value,
        negative_velocity_BNC: ir.Value,
        guidance_B: ir.Value,
    ) -> Sequence[ir.Value]:
        config, dtype = self.config, self.dtype
        tokens = Tokens(op, latents_BNC, prompt_embeds_BLJ, reference_BRC)
        steps = Steps(op, config, dtype, modulation_RM, step_B)

        image_BTD = self.img_in(op, cast(op, op.Concat(latents_BNC, reference_BRC, axis=1), "float32", dtype))
        text_BLD = self.txt_in(op, self.txt_norm(op, cast(op, prompt_embeds_BLJ, "float32", dtype)))
        for i, block in enumerate(self.transformer_blocks):
            last = i == config.layers - 1
            image_BTD, text_BLD = block(op, image_BTD, text_BLD, steps, (cos_SE, sin_SE), tokens, last=last)
        noise_BND = image_BTD  # the last block keeps nothing else
        gain_B1D, shift_B1D = split(op, steps.of_images(op, modulation_out_PO), 2, axis=2)
        noise_BND = steps.norm(op, noise_BND, shift_B1D, gain_B1D)
        velocity_BNC = cast(op, self.proj_out(op, noise_BND), dtype, "float32")
        dsigma_B11 = op.Unsqueeze(op.Gather(dsigma_P, step_B, axis=0), [1, 2])
        guidance_B11 = op.Unsqueeze(guidance_B, [1, 2])
        return velocity_BNC, euler_step(op, latents_BNC, velocity_BNC, negative_velocity_BNC, guidance_B11, dsigma_B11)


class Steps:
    """The step that each image of the batch is at, and what it modulates with.

    Attributes:
        step_B: int64, number of the step.
    """

    def __init__(self, op: Any, config: TransformerConfig, dtype: DType, modulation_RM: ir.Value, step_B: ir.Value):
        """Of the modulation of every step and block, in row step * layers + block."""
        self.step_B, self._dtype, self._modulation_RM = step_B, dtype, modulation_RM
        self._first_row_B = op.Mul(step_B, constant(op, config.layers, "int64"))
        self._one_D = constant(op, [1.0] * config.width, dtype)

    def of_block(self, op: Any, number: int) -> ir.Value:
        """The modulation of a block, [B, 1, M]."""
        return self._rows(op, self._modulation_RM, op.Add(self._first_row_B, constant(op, number, "int64")))

    def of_images(self, op: Any, values_PX: ir.Value) -> ir.Value:
        """The row of its step for each image, [B, 1, X]."""
        return self._rows(op, values_PX, self.step_B)

    def norm(self, op: Any, x_BSD: ir.Value, shift_B1D: ir.Value, gain_B1D: ir.Value) -> ir.Value:
        """LayerNorm(x) * gain + shift."""
        normalized_BSD = op.LayerNormalization(x_BSD, self._one_D, axis=-1, epsilon=EPS)
        return op.Add(op.Mul(normalized_BSD, gain_B1D), shift_B1D)

    def _rows(self, op: Any, values: ir.Value, row_B: ir.Value) -> ir.Value:
        tables = "bfloat16" if self._dtype == "bfloat16" else "float32"
        return cast(op, op.Unsqueeze(op.Gather(values, row_B, axis=0), [1]), tables, self._dtype)


class Tokens:
    """The number of tokens of each kind, and the masks that separate them; computed once.

    Attributes:
        noise, text: int64 [1], number of tokens.
        is_noise_T1: bool [T, 1], true for the noise tokens of the image stream.
        is_text_S11: bool [S, 1, 1], true for the text tokens of both streams together.
    """

    def __init__(self, op: Any, latents_BNC: ir.Value, prompt_BLJ: ir.Value, reference_BRC: ir.Value) -> None:
        self.noise = op.Shape(latents_BNC, start=1, end=2)
        self.text = op.Shape(prompt_BLJ, start=1, end=2)
        reference = op.Shape(reference_BRC, start=1, end=2)
        image = op.Add(self.noise, reference)
        self.is_noise_T1 = op.Less(op.Unsqueeze(self._indices(op, image), [1]), self.noise)
        self.is_text_S11 = op.Less(op.Unsqueeze(self._indices(op, op.Add(self.text, image)), [1, 2]), self.text)

    def _indices(self, op: Any, count_1: ir.Value) -> ir.Value:
        """0 .. ``count_1`` - 1, int64."""
        return op.Range(constant(op, 0, "int64"), op.Squeeze(count_1), constant(op, 1, "int64"))

    def of_noise(self, op: Any, x_BTD: ir.Value) -> ir.Value:
        """The noise tokens of the image stream, [B, N, D]."""
        return op.Slice(x_BTD, [0], self.noise, [1])

    def of_references(self, op: Any, x_BTD: ir.Value) -> ir.Value:
        """The reference tokens of the image stream, [B, R, D]."""
        return op.Slice(x_BTD, self.noise, [INT64_MAX], [1])


class Block(nn.Module):
    """One double-stream block: joint attention, and a feed-forward per stream, each modulated by the timestep."""

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
        steps: Steps,
        rotary_SE: Sequence[ir.Value],
        tokens: Tokens,
        *,
        last: bool,
    ) -> tuple[ir.Value, ir.Value]:
        """The image and the text stream after the block; of the last block, noise tokens [B, N, D] and ``text_BLD``."""
        noise, reference, text = self.modulations(op, steps.of_block(op, self.number))
        image_in_BTD = self.image_norm(op, image_BTD, noise.attention, reference.attention, steps, tokens)
        text_in_BLD = steps.norm(op, text_BLD, text.attention.shift, text.attention.gain)
        attended = self.attn(op, image_in_BTD, text_in_BLD, rotary_SE, tokens, last=last)
        if last:
            noise_out_BND, _ = attended
            noise_BND = op.Add(tokens.of_noise(op, image_BTD), op.Mul(noise.attention.gate, noise_out_BND))
            noise_out_BND = self.img_mlp(op, steps.norm(op, noise_BND, noise.mlp.shift, noise.mlp.gain))
            return op.Add(noise_BND, op.Mul(noise.mlp.gate, noise_out_BND)), text_BLD

        image_out_BTD, text_out_BLD = attended
        image_gate = self.image_gate(op, noise.attention, reference.attention, tokens)
        image_BTD = op.Add(image_BTD, op.Mul(image_gate, image_out_BTD))
        text_BLD = op.Add(text_BLD, op.Mul(text.attention.gate, text_out_BLD))
        image_out_BTD = self.img_mlp(op, self.image_norm(op, image_BTD, noise.mlp, reference.mlp, steps, tokens))
        image_gate = self.image_gate(op, noise.mlp, reference.mlp, tokens)
        image_BTD = op.Add(image_BTD, op.Mul(image_gate, image_out_BTD))
        text_out_BLD = self.txt_mlp(op, steps.norm(op, text_BLD, text.mlp.shift, text.mlp.gain))
        return image_BTD, op.Add(text_BLD, op.Mul(text.mlp.gate, text_out_BLD))

    def modulations(self, op: Any, modulation_B1M: ir.Value) -> tuple[StreamModulation, ...]:
        """The modulation of noise, reference and text tokens; without ``zero_cond_t`` references share the noise's.

        ``qie.engines.bundle.modulation_rows`` documents the order of the rows.
        """
        rows = iter(split(op, modulation_B1M, self.config.modulation_rows, axis=2))
        by_stream = {
            stream: StreamModulation(*(Modulation(*(next(rows) for _ in KINDS)) for _ in HALVES))
            for stream in streams(references=self.config.zero_cond_t)
        }
        noise = by_stream["noise"]
        return noise, by_stream.get("references", noise), by_stream["text"]

    def image_norm(
        self, op: Any, x_BTD: ir.Value, noise: Modulation, reference: Modulation, steps: Steps, tokens: Tokens
    ) -> ir.Value:
        """The modulated norm of the image stream, [B, T, D]."""
        if not self.config.zero_cond_t:
            return steps.norm(op, x_BTD, noise.shift, noise.gain)
        parts = (
            steps.norm(op, tokens.of_noise(op, x_BTD), noise.shift, noise.gain),
            steps.norm(op, tokens.of_references(op, x_BTD), reference.shift, reference.gain),
        )
        return op.Concat(*parts, axis=1)

    def image_gate(self, op: Any, noise: Modulation, reference: Modulation, tokens: Tokens) -> ir.Value:
        """The gate of the image stream: [B, T, D], or [B, 1, D] where references are modulated like noise."""
        if not self.config.zero_cond_t:
            return noise.gate
        return op.Where(tokens.is_noise_T1, noise.gate, reference.gate)


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
        self.norm_q = HeadNorm(k, dtype=dtype)
        self.norm_k = HeadNorm(k, dtype=dtype)
        self.norm_added_q = HeadNorm(k, dtype=dtype)
        self.norm_added_k = HeadNorm(k, dtype=dtype)
        self.to_out = Linear(d, d, dtype=dtype, name="to_out.0")
        self.to_add_out = Linear(d, d, dtype=dtype)

    def forward(
        self,
        op: Any,
        image_BTD: ir.Value,
        text_BLD: ir.Value,
        rotary_SE: Sequence[ir.Value],
        tokens: Tokens,
        *,
        last: bool,
    ) -> tuple[ir.Value, ir.Value]:
        """The branch outputs of image and text; in the last block of noise tokens [B, N, D] only, and ``text_BLD``."""
        key_BSD = op.Concat(self.add_k_proj(op, text_BLD), self.to_k(op, image_BTD), axis=1)
        value_BSD = op.Concat(self.add_v_proj(op, text_BLD), self.to_v(op, image_BTD), axis=1)
        key_BSD = self.rotate(op, key_BSD, self.of_tokens(op, tokens, self.norm_added_k, self.norm_k), rotary_SE)
        if last:
            end = op.Add(tokens.text, tokens.noise)
            query_rotary = tuple(op.Slice(t, tokens.text, end, [0]) for t in rotary_SE)
            query = self.to_q(op, tokens.of_noise(op, image_BTD))
            query = self.rotate(op, query, self.norm_q(op), query_rotary)
        else:
            query = op.Concat(self.add_q_proj(op, text_BLD), self.to_q(op, image_BTD), axis=1)
            query = self.rotate(op, query, self.of_tokens(op, tokens, self.norm_added_q, self.norm_q), rotary_SE)
        joint_out = attention(op, query, key_BSD, value_BSD, heads=self.config.heads)
        if last:
            return self.to_out(op, joint_out), text_BLD
        text_out_BLD = op.Slice(joint_out, [0], tokens.text, [1])
        image_out_BTD = op.Slice(joint_out, tokens.text, [INT64_MAX], [1])
        return self.to_out(op, image_out_BTD), self.to_add_out(op, text_out_BLD)

    def of_tokens(self, op: Any, tokens: Tokens, text: HeadNorm, image: HeadNorm) -> ir.Value:
        """The weight of the norm of each token, [S, 1, K]."""
        return op.Where(tokens.is_text_S11, text(op), image(op))

    def rotate(self, op: Any, x_BSD: ir.Value, weight: ir.Value, rotary_SE: Sequence[ir.Value]) -> ir.Value:
        """Queries or keys, normalized over each head's width and rotated."""
        config = self.config
        return norm_and_rotate(
            op, x_BSD, weight, *rotary_SE, heads=config.heads, width=config.width, dtype=self.dtype, eps=EPS
        )


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), Linear."""

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.up = Linear(width, 4 * width, dtype=dtype, name="net.0.proj")
        self.down = Linear(4 * width, width, dtype=dtype, name="net.2")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down(op, op.Gelu(self.up(op, x), approximate="tanh"))


def euler_step(
    op: Any,
    latents_BNC: ir.Value,
    velocity_BNC: ir.Value,
    negative_velocity_BNC: ir.Value,
    guidance_B11: ir.Value,
    dsigma_B11: ir.Value,
) -> ir.Value:
    """Latents + dsigma * guided velocity, rescaled for each token to the norm of the velocity without guidance."""
    difference_BNC = op.Sub(velocity_BNC, negative_velocity_BNC)
    guided_BNC = op.Add(negative_velocity_BNC, op.Mul(guidance_B11, difference_BNC))
    norm_BN1 = op.ReduceL2(velocity_BNC, [-1], keepdims=1)
    guided_norm_BN1 = op.ReduceL2(guided_BNC, [-1], keepdims=1)
    tiny = constant(op, 1e-30)
    rescaled_BNC = op.Mul(guided_BNC, op.Div(norm_BN1, op.Max(guided_norm_BN1, tiny)))
    return op.Add(latents_BNC, op.Mul(dsigma_B11, rescaled_BNC))
