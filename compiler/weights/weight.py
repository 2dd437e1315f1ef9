"""A graph's parameters as names into the checkpoint.

A graph is written without any weights: each parameter says which tensor of the checkpoint it is, and how that tensor
must be laid out. ``qie.compiler.weights.stream`` follows these instructions when it streams the checkpoint.
"""

from dataclasses import dataclass
from typing import Literal

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.quantizer import Codes, Quantizer

__all__ = ["DType", "Layout", "Stored", "Weight"]

DType = Literal["float32", "bfloat16"]
"""The element type in which a graph computes."""

Stored = DType | Codes
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

    ``name`` is both the ONNX initializer's name and the checkpoint's tensor name (prefixes of the text encoder made
    canonical). ``shape`` and ``dtype`` are the graph's; the steps of ``layout`` are applied in order to the
    checkpoint's tensor, and the result is reshaped to ``shape`` (same number of elements).

    With a ``quantizer`` the parameter holds its codes of that tensor; ``scale_of`` names the tensor of which the
    parameter holds the quantizer's scales instead.
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
        """The checkpoint's name of the tensor that the parameter is made of."""
        return self.scale_of or self.name
