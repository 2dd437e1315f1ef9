"""A graph's parameters as names into the checkpoint.

A graph is written without weights: each parameter names a tensor of the checkpoint and the layout in which the graph
needs it. ``qie.compiler.weights.stream`` applies that layout when it streams the checkpoint.
"""

from dataclasses import dataclass
from typing import Literal

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.quantizer import QuantizedDType, Quantizer

__all__ = ["DType", "Layout", "Stored", "Weight"]

DType = Literal["float32", "bfloat16"]
"""The element type in which a graph computes."""

Stored = DType | QuantizedDType
"""The element type in which a graph stores a weight."""

Layout = Literal["last_frame", "flatten", "transpose"]
"""One step from the checkpoint's layout to the graph's:

- ``last_frame``: a causal Conv3d kernel [out, in, t, h, w] becomes the Conv2d kernel of its last temporal slice,
  which is exact for a single frame because the frames before it are zeros.
- ``flatten``: [out, …] becomes [out, product of the rest].
- ``transpose``: [out, in] becomes [in, out].
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One parameter of a graph.

    Attributes:
        name: name of the ONNX initializer and of the checkpoint's tensor, with the text encoder's canonical prefix.
        subfolder: subfolder of the checkpoint that holds the tensor.
        shape: shape in the graph; the laid-out tensor is reshaped to it.
        dtype: element type in the graph.
        layout: steps that are applied in order to the checkpoint's tensor.
        quantizer: quantizer of the tensor, whose quantized values the parameter holds; None where it is not quantized.
        scale_of: name of the tensor whose scales the parameter holds instead; None where it holds values.
    """

    name: str
    subfolder: Subfolder
    shape: tuple[int, ...]
    dtype: Stored
    layout: tuple[Layout, ...] = ()
    quantizer: Quantizer | None = None
    scale_of: str | None = None

    @property
    def source(self) -> str:
        """Name of the checkpoint's tensor that the parameter is made from."""
        return self.scale_of or self.name
