"""Quantization schemes, one row each: how the weights and the inputs of linears are quantized."""

from collections.abc import Mapping
from dataclasses import dataclass

from qie.compiler.recipe.schema import SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.engines.bundle.manifest import Component

__all__ = ["ALL_SCHEMES", "ATTENTION", "SCHEMES", "Scheme"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One quantization scheme.

    Attributes:
        weights: quantizer of the weights [in, out].
        inputs: quantizer of what the weights are multiplied with; None for weight-only quantization.
        smoothed: components whose linears are smoothed before quantization (``quantization.smoothing``).
    """

    weights: Quantizer
    inputs: Quantizer | None = None
    smoothed: tuple[Component, ...] = ()

    @property
    def scales_products(self) -> bool:
        """Whether a graph multiplies products by the scales of the weights, rather than the weights
        (``quantization.qdq``): scales of channels, in products of 8-bit operands. Without quantized inputs the scaled
        weights are what a product reads, so that nothing is gained (docs/tensorrt.md)."""
        return self.inputs is not None and self.weights.per == "channel"


SCHEMES: dict[SchemeName, Scheme] = {
    "fp8": Scheme(
        weights=Quantizer(dtype="float8_e4m3fn", per="channel"),
        inputs=Quantizer(dtype="float8_e4m3fn"),
    ),
    "int8-smooth": Scheme(
        weights=Quantizer(dtype="int8", per="channel"),
        inputs=Quantizer(dtype="int8"),
        smoothed=("language", "transformer"),
    ),
    "w8a16": Scheme(
        weights=Quantizer(dtype="int8", per="channel"),
        smoothed=("language",),
    ),
    "w4a16": Scheme(
        weights=Quantizer(dtype="int4", per="group", group_size=128, bf16_scales=True),
        smoothed=("language",),
    ),
}
"""Every scheme by its name in a recipe; "none" stands for no quantization and has no row."""

ALL_SCHEMES: Mapping[Component, tuple[SchemeName, ...]] = {
    "language": tuple(SCHEMES),
    "transformer": tuple(SCHEMES),
}
"""Every scheme of the components that linears are measured of."""

ATTENTION = Quantizer(dtype="float8_e4m3fn")
"""Quantizer of queries, keys and values where a recipe sets ``attention`` to "fp8"."""
