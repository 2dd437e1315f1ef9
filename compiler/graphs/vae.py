"""The VAE as two graphs: image to latents, latents to image, for single frames.

Architecture: diffusers ``models/autoencoders/autoencoder_kl_qwenimage.py``. For one frame every causal Conv3d sees
zeros in front of it, so it equals the Conv2d of its last temporal slice, and the temporal resampling convolutions are
unused. The graphs include pixel scaling, latent normalization and 2x2 packing (``pipelines/qwenimage/
pipeline_qwenimage_edit_plus.py``: _encode_vae_image, _pack_latents).

Shape suffixes: B batch, H W pixels or feature rows and columns, C channels, h w rows and columns of tokens
(16 pixels wide), P = H * W positions.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from qie.compiler.checkpoint.configs import VaeConfig
from qie.compiler.graphs.graph import Graph, Parameter, constant
from qie.compiler.graphs.layers import cast, loop, silu, split
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import TensorSpec

__all__ = ["vae_decoder", "vae_encoder"]


def vae_encoder(config: VaeConfig, *, dtype: DType) -> Graph:
    """The graph from ``image`` uint8 [B, H, W, 3] to ``latents`` float32 [B, h, w, 64].

    The latents are the posterior's mode, normalized and packed 2x2 with channels major. H and W are multiples of 16.
    """
    inputs = (TensorSpec(name="image", dtype="uint8", dims=("batch", "height", "width", 3)),)
    outputs = (TensorSpec(name="latents", dtype="float32", dims=("batch", "rows", "columns", 4 * config.z_dim)),)
    return Graph.trace("vae_encoder", "vae", dtype, EncoderGraph(config, dtype), inputs=inputs, outputs=outputs)


def vae_decoder(config: VaeConfig, *, dtype: DType) -> Graph:
    """The graph from ``latents`` float32 [B, h, w, 64], normalized and packed, to ``image`` uint8 [B, H, W, 3]."""
    inputs = (TensorSpec(name="latents", dtype="float32", dims=("batch", "rows", "columns", 4 * config.z_dim)),)
    outputs = (TensorSpec(name="image", dtype="uint8", dims=("batch", "height", "width", 3)),)
    return Graph.trace("vae_decoder", "vae", dtype, DecoderGraph(config, dtype), inputs=inputs, outputs=outputs)


class EncoderGraph(nn.Module):
    """Pixels in, packed latents out."""

    def __init__(self, config: VaeConfig, dtype: DType) -> None:
        super().__init__("")
        self.config = config
        self.dtype: DType = dtype
        self.encoder = Encoder(config, dtype)
        self.quant_conv = Conv(2 * config.z_dim, 2 * config.z_dim, 1, dtype=dtype, causal=True)

    def forward(self, op: Any, image_BHWC: ir.Value) -> Sequence[ir.Value]:
        pixels_BCHW = op.Transpose(op.Cast(image_BHWC, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2])
        scaled_BCHW = op.Sub(op.Div(pixels_BCHW, constant(op, 127.5)), constant(op, 1.0))
        moments_BCHW = self.quant_conv(op, self.encoder(op, cast(op, scaled_BCHW, "float32", self.dtype)))
        mode_BCHW, _ = split(op, moments_BCHW, 2, axis=1)
        centered_BCHW = op.Sub(cast(op, mode_BCHW, self.dtype, "float32"), mean(op, self.config))
        return (pack(op, op.Div(centered_BCHW, std(op, self.config)), self.config.z_dim),)


class DecoderGraph(nn.Module):
    """Packed latents in, pixels out."""

    def __init__(self, config: VaeConfig, dtype: DType) -> None:
        super().__init__("")
        self.config = config
        self.dtype: DType = dtype
        self.post_quant_conv = Conv(config.z_dim, config.z_dim, 1, dtype=dtype, causal=True)
        self.decoder = Decoder(config, dtype)

    def forward(self, op: Any, latents_BhwC: ir.Value) -> Sequence[ir.Value]:
        scaled_BCHW = op.Mul(unpack(op, latents_BhwC, self.config.z_dim), std(op, self.config))
        latents_BCHW = op.Add(scaled_BCHW, mean(op, self.config))
        image_BCHW = self.decoder(op, self.post_quant_conv(op, cast(op, latents_BCHW, "float32", self.dtype)))
        clipped_BCHW = op.Clip(cast(op, image_BCHW, self.dtype, "float32"), constant(op, -1.0), constant(op, 1.0))
        unit_BCHW = op.Add(op.Mul(clipped_BCHW, constant(op, 0.5)), constant(op, 0.5))
        levels_BHWC = op.Round(op.Mul(op.Transpose(unit_BCHW, perm=[0, 2, 3, 1]), constant(op, 255.0)))
        return (op.Cast(levels_BHWC, to=ir.DataType.UINT8),)


class Encoder(nn.Module):
    """Residual blocks and downsampling by 8, a middle block with attention, a head."""

    def __init__(self, config: VaeConfig, dtype: DType) -> None:
        super().__init__()
        widths = [config.base_width * m for m in (1, *config.multipliers)]
        blocks: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            for i in range(config.blocks):
                blocks.append(Residual(inputs if i == 0 else outputs, outputs, dtype))
            if level < len(config.multipliers) - 1:
                blocks.append(Downsample(outputs, dtype))
        self.conv_in = Conv(3, widths[0], 3, dtype=dtype, causal=True)
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = Middle(widths[-1], dtype)
        self.norm_out = ChannelNorm(widths[-1], dtype)
        self.conv_out = Conv(widths[-1], 2 * config.z_dim, 3, dtype=dtype, causal=True)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self.conv_in(op, x)
        for block in self.down_blocks:
            x = block(op, x)
        x = self.mid_block(op, x)
        return self.conv_out(op, silu(op, self.norm_out(op, x)))


class Decoder(nn.Module):
    """A middle block with attention, residual blocks and upsampling by 8, a head."""

    def __init__(self, config: VaeConfig, dtype: DType) -> None:
        super().__init__()
        widths = [config.base_width * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        ups: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            inputs = inputs if level == 0 else inputs // 2
            ups.append(Up(inputs, outputs, config.blocks + 1, level < len(config.multipliers) - 1, dtype))
        self.conv_in = Conv(config.z_dim, widths[0], 3, dtype=dtype, causal=True)
        self.mid_block = Middle(widths[0], dtype)
        self.up_blocks = nn.ModuleList(ups)
        self.norm_out = ChannelNorm(widths[-1], dtype)
        self.conv_out = Conv(widths[-1], 3, 3, dtype=dtype, causal=True)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self.mid_block(op, self.conv_in(op, x))
        for up in self.up_blocks:
            x = up(op, x)
        return self.conv_out(op, silu(op, self.norm_out(op, x)))


class Up(nn.Module):
    """Residual blocks, then upsampling on all levels but the last."""

    def __init__(self, inputs: int, outputs: int, blocks: int, upsample: bool, dtype: DType) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(inputs if i == 0 else outputs, outputs, dtype) for i in range(blocks)])
        self.upsampler = Upsample(outputs, dtype) if upsample else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        for block in self.resnets:
            x = block(op, x)
        return self.upsampler(op, x) if self.upsampler is not None else x


class Residual(nn.Module):
    """Norm, SiLU and convolution, twice, plus a shortcut."""

    def __init__(self, inputs: int, outputs: int, dtype: DType) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(inputs, dtype)
        self.conv1 = Conv(inputs, outputs, 3, dtype=dtype, causal=True)
        self.norm2 = ChannelNorm(outputs, dtype)
        self.conv2 = Conv(outputs, outputs, 3, dtype=dtype, causal=True)
        self.conv_shortcut = Conv(inputs, outputs, 1, dtype=dtype, causal=True) if inputs != outputs else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        y = self.conv1(op, silu(op, self.norm1(op, x)))
        y = self.conv2(op, silu(op, self.norm2(op, y)))
        return op.Add(y, self.conv_shortcut(op, x) if self.conv_shortcut is not None else x)


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(width, width, dtype) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(width, dtype)])

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        first, second = self.resnets
        (attend,) = self.attentions
        return second(op, attend(op, first(op, x)))


class SpatialAttention(nn.Module):
    """Single-head attention over all positions, one row of queries at a time.

    The head is as wide as the feature map, too wide for a fused kernel, so the scores are a tensor. The loop limits
    them to one row, [B, W, P]; computed at once, or in chunks that a compiler may run in parallel, they are [B, P, P].
    """

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.width = width
        self.dtype: DType = dtype
        self.norm = ChannelNorm(width, dtype)
        self.to_qkv = Conv(width, 3 * width, 1, dtype=dtype)
        self.proj = Conv(width, width, 1, dtype=dtype)

    def forward(self, op: Any, x_BCHW: ir.Value) -> ir.Value:
        q_BCHW, k_BCHW, v_BCHW = split(op, self.to_qkv(op, self.norm(op, x_BCHW)), 3, axis=1)
        scaled = op.Mul(q_BCHW, constant(op, self.width**-0.5, self.dtype))
        q_HBWC = op.Transpose(scaled, perm=[2, 0, 3, 1])
        k_BCP = op.Reshape(k_BCHW, [0, 0, -1])
        v_BPC = op.Transpose(op.Reshape(v_BCHW, [0, 0, -1]), perm=[0, 2, 1])

        def attend(op: Any, row: ir.Value) -> ir.Value:
            weights_BWP = op.Softmax(op.MatMul(op.Gather(q_HBWC, row, axis=0), k_BCP), axis=-1)
            return op.MatMul(weights_BWP, v_BPC)

        y_HBWC = loop(op, op.Shape(x_BCHW, start=2, end=3), attend, self.dtype)
        return op.Add(x_BCHW, self.proj(op, op.Transpose(y_HBWC, perm=[1, 3, 0, 2])))


class Downsample(nn.Module):
    """Halves rows and columns: a strided convolution over an image padded at the right and at the bottom."""

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.conv = Conv(width, width, 3, dtype=dtype, stride=2, pads=(0, 0, 1, 1), name="resample.1")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.conv(op, x)


class Upsample(nn.Module):
    """Doubles rows and columns by nearest-neighbor interpolation, then a convolution to half the channels.

    It repeats values, in float32, which changes none: onnxruntime has no kernel for bfloat16. TensorRT for RTX compiles
    casts and interpolation into one kernel.
    """

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__("upsamplers.0")
        self.dtype: DType = dtype
        self.conv = Conv(width, width // 2, 3, dtype=dtype, name="resample.1")

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        scales = constant(op, np.array([1, 1, 2, 2], dtype=np.float32))
        wide = cast(op, x, self.dtype, "float32")
        doubled = op.Resize(
            wide, None, scales, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"
        )
        return self.conv(op, cast(op, doubled, "float32", self.dtype))


class Conv(nn.Module):
    """A 2-D convolution; ``causal`` marks a kernel that the checkpoint stores in 3-D."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        dtype: DType,
        causal: bool = False,
        stride: int = 1,
        pads: tuple[int, int, int, int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.weight = Parameter([outputs, inputs, kernel, kernel], dtype, ("last_frame",) if causal else ())
        self.bias = Parameter([outputs], dtype)
        self.stride = stride
        self.pads = pads or (kernel // 2,) * 4

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Conv(x, self.weight, self.bias, strides=[self.stride] * 2, pads=list(self.pads))


class ChannelNorm(nn.Module):
    """x / ‖x‖ * sqrt(C) * gamma over the channels of each position, in float32 (QwenImageRMS_norm)."""

    def __init__(self, width: int, dtype: DType) -> None:
        super().__init__()
        self.width = width
        self.dtype: DType = dtype
        self.gamma = Parameter([width, 1, 1], dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        wide = cast(op, x, self.dtype, "float32")
        length = op.Max(op.ReduceL2(wide, [1], keepdims=1), constant(op, 1e-12))
        unit = cast(op, op.Div(wide, length), "float32", self.dtype)
        return op.Mul(unit, op.Mul(self.gamma, constant(op, self.width**0.5, self.dtype)))


def mean(op: Any, config: VaeConfig) -> ir.Value:
    """[1, z, 1, 1] float32."""
    return constant(op, np.array(config.latents_mean, dtype=np.float32).reshape(1, -1, 1, 1))


def std(op: Any, config: VaeConfig) -> ir.Value:
    """[1, z, 1, 1] float32."""
    return constant(op, np.array(config.latents_std, dtype=np.float32).reshape(1, -1, 1, 1))


def pack(op: Any, latents_BCHW: ir.Value, z_dim: int) -> ir.Value:
    """[B, z, 2h, 2w] to [B, h, w, 4z], within a token channel first, then the 2x2 position."""
    blocks = op.Transpose(op.SpaceToDepth(latents_BCHW, blocksize=2), perm=[0, 2, 3, 1])
    positions_first = op.Reshape(blocks, [0, 0, 0, 4, z_dim])
    return op.Reshape(op.Transpose(positions_first, perm=[0, 1, 2, 4, 3]), [0, 0, 0, 4 * z_dim])


def unpack(op: Any, latents_BhwC: ir.Value, z_dim: int) -> ir.Value:
    """[B, h, w, 4z] to [B, z, 2h, 2w]: the inverse of ``pack``."""
    channels_first = op.Reshape(latents_BhwC, [0, 0, 0, z_dim, 4])
    blocks = op.Reshape(op.Transpose(channels_first, perm=[0, 1, 2, 4, 3]), [0, 0, 0, 4 * z_dim])
    return op.DepthToSpace(op.Transpose(blocks, perm=[0, 3, 1, 2]), blocksize=2, mode="DCR")
