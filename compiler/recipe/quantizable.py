"""What can be quantized and how, by name: light, because the help of `qie calibrate` shows it."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qie.engines.bundle.manifest import Component

__all__ = ["QUANTIZABLE", "SchemeName"]

SchemeName = Literal["none", "fp8", "int8-smooth", "w8a16", "w4a16"]

QUANTIZABLE: "dict[Component, str]" = {
    "language": "language_model.layers.*",
    "transformer": "transformer_blocks.*",
}
"""Component that can be quantized -> fnmatch pattern of its linears: those of its blocks, never embedders, output
layers or modulation. Vision tower and VAE are small, and their errors show in the image."""
