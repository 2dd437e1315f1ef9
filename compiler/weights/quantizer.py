"""Quantizers in numpy: float tensors to 8-bit and 4-bit values with scales, and back.

Quantization is symmetric, without zero points: x = quantized value * scale. The amax of the elements that share a scale
becomes qmax. Values round to nearest, ties to even, and saturate as in ONNX QuantizeLinear: an integer below -qmax can
become -qmax - 1.
"""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes  # also registers its dtypes with numpy by name
import numpy as np
from numpy.typing import NDArray

__all__ = ["QuantizedDType", "Quantizer"]

QuantizedDType = Literal["float8_e4m3fn", "int8", "int4"]

_QMAX: dict[QuantizedDType, float] = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}
"""E4M3's largest number (OCP 8-bit floating point specification); the largest integer whose negative exists."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """How a tensor is quantized.

    Attributes:
        dtype: type of the quantized values.
        per: what shares a scale: the whole tensor, an output channel of a weight [in, out], or a group of inputs of an
            output channel.
        group_size: inputs of a group.
        bf16_scales: whether scales are rounded to bfloat16.
    """

    dtype: QuantizedDType
    per: Literal["tensor", "channel", "group"] = "tensor"
    group_size: int = 0
    bf16_scales: bool = False

    @property
    def qmax(self) -> float:
        """The quantized value of amax."""
        return _QMAX[self.dtype]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape``, which is [in, out] unless the scale is per tensor."""
        match self.per:
            case "tensor":
                return ()
            case "channel":
                return (shape[1],)
            case "group":
                return (-(-shape[0] // self.group_size), shape[1])

    def scale(self, tensor: NDArray[Any]) -> Array:
        """Scales of ``tensor``, float32; 1 where all elements that share a scale are 0."""
        magnitude = np.abs(tensor.astype(np.float32, copy=False))
        match self.per:
            case "tensor":
                amax = magnitude.max(initial=0.0)
            case "channel":
                amax = magnitude.max(0)
            case "group":
                starts = np.arange(0, len(tensor), self.group_size)
                amax = np.maximum.reduceat(magnitude, starts, axis=0)
        return self.scale_from_amax(amax)

    def scale_from_amax(self, amax: Any) -> Array:
        """Scales, float32, of elements whose largest magnitude is ``amax``; 1 where that is 0."""
        amax = np.asarray(amax, np.float32)
        scale = np.where(amax > 0, amax / np.float32(self.qmax), np.float32(1)).astype(np.float32)
        return scale.astype(ml_dtypes.bfloat16).astype(np.float32) if self.bf16_scales else scale

    def quantize(self, tensor: NDArray[Any], scale: Array) -> NDArray[Any]:
        """Quantized values of ``tensor``, in the numpy or ml_dtypes type ``dtype``."""
        steps = tensor.astype(np.float32, copy=False) / self._expand(scale, tensor.shape)
        if self.dtype == "float8_e4m3fn":
            np.clip(steps, -self.qmax, self.qmax, out=steps)
        else:
            np.rint(steps, out=steps)
            np.clip(steps, -self.qmax - 1, self.qmax, out=steps)
        return steps.astype(np.dtype(self.dtype))

    def dequantize(self, quantized: NDArray[Any], scale: Array) -> Array:
        """Quantized values times their scales, float32."""
        values: Array = quantized.astype(np.float32) * self._expand(scale, quantized.shape)
        return values

    def fake_quantize(self, tensor: NDArray[Any], scale: Array | None = None) -> Array:
        """``tensor`` quantized and dequantized, by its own scales unless ``scale`` is given."""
        scale = self.scale(tensor) if scale is None else scale
        return self.dequantize(self.quantize(tensor, scale), scale)

    def _expand(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """Scales in a shape that broadcasts with a tensor of ``shape``."""
        return scale if self.per != "group" else scale.repeat(self.group_size, axis=0)[: shape[0]]
