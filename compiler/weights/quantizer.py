"""Quantizers in numpy: float tensors to 8-bit and 4-bit values with scales, and back.

Quantization is symmetric, without zero points: x = quantized value * scale. The amax of the elements that share a scale
becomes qmax. Values round to nearest, ties to even, and saturate as in ONNX QuantizeLinear: an integer below -qmax can
become -qmax - 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes  # also registers its dtypes with numpy by name
import numpy as np
from numpy.typing import NDArray

from qie.compiler.weights.e4m3 import LARGEST, encode_e4m3, round_to_e4m3
from qie.compiler.weights.magnitude import BLOCK, largest_in_columns, largest_in_rows, magnitude
from qie.compiler.weights.threads import in_threads

__all__ = ["QuantizedDType", "Quantizer"]

QuantizedDType = Literal["float8_e4m3fn", "int8", "int4"]

_QMAX: dict[QuantizedDType, float] = {"float8_e4m3fn": LARGEST, "int8": 127.0, "int4": 7.0}
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
        return self.scale_from_amax(self.amax(tensor))

    def amax(self, tensor: NDArray[Any]) -> Array:
        """Largest magnitudes of the elements of ``tensor`` that share a scale, float32; NaN where one is NaN."""
        values, transposed = _in_memory_order(tensor)
        match self.per:
            case "tensor":
                return np.asarray(magnitude(values), np.float32)
            case "channel":
                return largest_in_rows(values) if transposed else largest_in_columns(values)
            case "group" if not transposed:
                groups = [values[start : start + self.group_size] for start in range(0, len(values), self.group_size)]
                return np.stack([largest_in_columns(group) for group in groups])
            case "group" if values.shape[1] % self.group_size == 0:
                return np.ascontiguousarray(
                    largest_in_rows(values.reshape(-1, self.group_size)).reshape(len(values), -1).T
                )
            case _:
                return self.amax(np.ascontiguousarray(tensor))

    def scale_from_amax(self, amax: Any) -> Array:
        """Scales, float32, of elements whose largest magnitude is ``amax``; 1 where that is 0."""
        amax = np.asarray(amax, np.float32)
        scale = np.where(amax > 0, amax / np.float32(self.qmax), np.float32(1)).astype(np.float32)
        return scale.astype(ml_dtypes.bfloat16).astype(np.float32) if self.bf16_scales else scale

    def quantize(self, tensor: NDArray[Any], scale: Array) -> NDArray[Any]:
        """Quantized values of ``tensor``, in the numpy or ml_dtypes type ``dtype``."""
        quantized = np.empty(tensor.shape, np.uint8, order=_order(tensor))
        self._divide(tensor, scale, quantized, self._encode)
        return quantized.view(np.dtype(self.dtype))

    def dequantize(self, quantized: NDArray[Any], scale: Array) -> Array:
        """Quantized values times their scales, float32."""
        values: Array = quantized.astype(np.float32) * self._expand(scale, quantized.shape)
        return values

    def fake_quantize(self, tensor: NDArray[Any], scale: Array | None = None) -> Array:
        """``tensor`` quantized and dequantized, by its own scales unless ``scale`` is given."""
        scale = self.scale(tensor) if scale is None else scale
        values = np.empty(tensor.shape, np.float32, order=_order(tensor))
        self._divide(tensor, scale, values, self._round)
        return values

    def _divide(self, tensor: NDArray[Any], scale: Array, out: NDArray[Any], step: "_Step") -> None:
        """Call ``step`` with blocks of ``tensor`` divided by their scales."""
        values, transposed = _in_memory_order(tensor)
        scale = np.asarray(scale, np.float32)
        if transposed:
            out = out.T
        if scale.size == 1:
            _in_blocks(values.reshape(-1, 1), out.reshape(-1, 1), lambda start, stop: scale.reshape(()), step)
            return
        columns = values.shape[-1]
        whole_groups = self.per == "group" and transposed and columns % self.group_size == 0
        if whole_groups:  # a group is a row of its own
            columns, scale = self.group_size, np.ascontiguousarray(scale.T).reshape(-1)
        values, out = values.reshape(-1, columns), out.reshape(-1, columns)
        match self.per, transposed:
            case "group", False:
                numbers = np.arange(len(values)) // self.group_size
                _in_blocks(values, out, lambda start, stop: scale[numbers[start:stop]], step)
            case "group", True if not whole_groups:
                numbers = np.arange(columns) // self.group_size
                _in_blocks(values, out, lambda start, stop: scale.T[start:stop][:, numbers], step)
            case _, True:
                _in_blocks(values, out, lambda start, stop: scale[start:stop, None], step)
            case _:
                _in_blocks(values, out, lambda start, stop: scale, step)

    def _encode(self, steps: Array, scale: Array, out: NDArray[Any], scratch: NDArray[Any]) -> None:
        """Write the quantized values of ``steps``, as bytes."""
        if self.dtype == "float8_e4m3fn":
            encode_e4m3(steps, out, scratch)
            return
        self._round_to_integers(steps)
        np.copyto(out.view(np.int8), steps, casting="unsafe")
        if self.dtype == "int4":
            np.bitwise_and(out, np.uint8(0xF), out=out)

    def _round(self, steps: Array, scale: Array, out: NDArray[Any], scratch: NDArray[Any]) -> None:
        """Write the numbers that the quantized values of ``steps`` stand for."""
        if self.dtype == "float8_e4m3fn":
            round_to_e4m3(steps, scratch)
        else:
            self._round_to_integers(steps)
            np.add(steps, np.float32(0), out=steps)  # integers have no negative zero
        np.multiply(steps, scale, out=out)

    def _round_to_integers(self, steps: Array) -> None:
        np.rint(steps, out=steps)
        np.clip(steps, -self.qmax - 1, self.qmax, out=steps)

    def _expand(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """Scales in a shape that broadcasts with a tensor of ``shape``."""
        return scale if self.per != "group" else scale.repeat(self.group_size, axis=0)[: shape[0]]


_Step = Callable[[Array, Array, NDArray[Any], NDArray[Any]], None]
"""Called with a block divided by its scales, the scales, where to write, and scratch of 32 bits an element."""


def _order(tensor: NDArray[Any]) -> Literal["C", "F"]:
    """The order in memory of what is made of ``tensor``."""
    return "F" if tensor.ndim == 2 and tensor.flags.f_contiguous and not tensor.flags.c_contiguous else "C"


def _in_memory_order(tensor: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """``tensor`` as a contiguous array, in a type of which magnitudes are taken, and whether it is transposed."""
    if tensor.dtype.name not in ("float32", "float16", "bfloat16"):
        tensor = tensor.astype(np.float32)
    transposed = _order(tensor) == "F"
    return np.ascontiguousarray(tensor.T if transposed else tensor), transposed


def _in_blocks(values: NDArray[Any], out: NDArray[Any], scales: Callable[[int, int], Array], step: _Step) -> None:
    """Divide ``values`` [rows, columns] by the scales of their rows and call ``step``, some rows at a time."""
    columns = values.shape[1]

    def work(start: int, stop: int) -> None:
        rows = max(1, min(BLOCK // columns, stop - start))
        steps, scratch = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.uint32)
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            block, scale = steps[: last - first], scales(first, last)
            np.copyto(block, values[first:last])
            np.divide(block, scale, out=block)
            step(block, scale, out[first:last], scratch[: last - first])

    if values.size:
        in_threads(work, len(values), elements=values.size)
