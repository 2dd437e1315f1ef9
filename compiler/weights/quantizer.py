"""Quantizers in numpy: the numbers that 8-bit and 4-bit tensors hold, and the scales that give them back.

Symmetric, without zero points: a value is ``code * scale``. The largest magnitude of what shares a scale gets the
highest code. Codes round to nearest, ties to even, and saturate, as ONNX QuantizeLinear has it: what is beyond the
range below may get the one negative integer that has no counterpart.
"""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["Codes", "Quantizer"]

Codes = Literal["float8_e4m3fn", "int8", "int4"]

_DTYPES: dict[Codes, np.dtype[Any]] = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
}

_HIGHEST: dict[Codes, float] = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}
"""E4M3's largest number (OCP 8-bit floating point specification); of integers the one that has a counterpart."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantizer:
    """How a tensor becomes ``codes``.

    One scale serves the whole ``tensor``, each output ``channel`` of a weight [in, out], or each ``group`` of so many
    inputs of each output channel. ``coarse`` scales are rounded to bfloat16.
    """

    codes: Codes
    per: Literal["tensor", "channel", "group"] = "tensor"
    group: int = 0
    coarse: bool = False

    @property
    def highest(self) -> float:
        """The largest magnitude of a code."""
        return _HIGHEST[self.codes]

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of ``shape``, which is [in, out] unless one scale serves all."""
        match self.per:
            case "tensor":
                return ()
            case "channel":
                return (shape[1],)
            case "group":
                return (-(-shape[0] // self.group), shape[1])

    def scale(self, tensor: NDArray[Any]) -> Array:
        """Float32 scales; 1 where all of what shares a scale is 0."""
        magnitude = np.abs(tensor.astype(np.float32, copy=False))
        match self.per:
            case "tensor":
                most = magnitude.max(initial=0.0)
            case "channel":
                most = magnitude.max(0)
            case "group":
                starts = np.arange(0, len(tensor), self.group)
                most = np.maximum.reduceat(magnitude, starts, axis=0)
        return self.scale_of(most)

    def scale_of(self, most: Any) -> Array:
        """Scales of what is at most so large."""
        most = np.asarray(most, np.float32)
        scale = np.where(most > 0, most / np.float32(self.highest), np.float32(1)).astype(np.float32)
        return scale.astype(ml_dtypes.bfloat16).astype(np.float32) if self.coarse else scale

    def encode(self, tensor: NDArray[Any], scale: Array) -> NDArray[Any]:
        """Codes of ``tensor``, in numpy's or ml_dtypes' type of that name."""
        steps = tensor.astype(np.float32, copy=False) / self._spread(scale, tensor.shape)
        if self.codes == "float8_e4m3fn":
            np.clip(steps, -self.highest, self.highest, out=steps)
        else:
            np.rint(steps, out=steps)
            np.clip(steps, -self.highest - 1, self.highest, out=steps)
        return steps.astype(_DTYPES[self.codes])

    def decode(self, codes: NDArray[Any], scale: Array) -> Array:
        """What the codes stand for, in float32."""
        values: Array = codes.astype(np.float32) * self._spread(scale, codes.shape)
        return values

    def rounded(self, tensor: NDArray[Any], scale: Array | None = None) -> Array:
        """``tensor`` as it comes back from its codes."""
        scale = self.scale(tensor) if scale is None else scale
        return self.decode(self.encode(tensor, scale), scale)

    def _spread(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """Scales in a shape that broadcasts with a tensor of ``shape``."""
        return scale if self.per != "group" else scale.repeat(self.group, axis=0)[: shape[0]]
