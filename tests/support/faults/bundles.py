"""The sound bundles that faults break: of the pocket model, for onnxruntime on the CPU."""

from pathlib import Path

from tests.support.bundles import build

__all__ = ["RECIPES", "build_sound"]

QUANTIZED = """\
extends = "cpu"

[components.transformer]
scheme = "{scheme}"
exclude = ["transformer_blocks.0.*", "transformer_blocks.1.*", "transformer_blocks.-2.*", "transformer_blocks.-1.*"]

[gates.components]
transformer = {transformer}

[gates.trajectory]
velocity = {steps}
latents = {steps}
block = 0.1
"""

RECIPES = {
    "pocket": "cpu",
    "pocket in FP8": QUANTIZED.format(scheme="fp8", transformer=0.05, steps=0.08),
    "pocket in INT8": QUANTIZED.format(scheme="int8-smooth", transformer=0.1, steps=0.15),
}
"""Bundle -> recipe: in float32, and with scheme and gates of l40s.toml and a100-int8.toml."""


def build_sound(name: str, destination: Path) -> Path:
    """Build the bundle ``name`` in the folder ``destination``."""
    return build("pocket", destination, RECIPES[name]).path
