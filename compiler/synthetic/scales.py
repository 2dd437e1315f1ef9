"""Center and standard deviation of the weights by the kind of parameter, so that activations stay near 1."""

import math

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import Shape

__all__ = ["center_and_std"]

_GAINS = {
    "timestep_embedder.linear_1": 2.0,
    "timestep_embedder.linear_2": 2.0,
    "attn.to_out.0": 2.0,
    "attn.to_add_out": 2.0,
    "norm_out.linear": 0.5,
    "self_attn.o_proj": 0.5,
    "mlp.down_proj": 0.5,
    "encoder.conv_out": 2.5,
    "post_quant_conv": 0.5,
    "decoder.conv_out": 0.4,
}
"""End of a layer's name -> standard deviation of its output for inputs of standard deviation 1; 1 for all others."""


def center_and_std(subfolder: Subfolder, name: str, shape: Shape) -> tuple[float, float]:
    """Center and standard deviation of a tensor's values."""
    layer, _, kind = name.rpartition(".")
    if kind == "bias":
        return 0.0, 0.1
    if kind == "gamma" or len(shape) == 1:
        return 1.0, 0.2
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    fan_in = math.prod((shape[1], *shape[-2:]) if subfolder == "vae" else shape[1:])
    gain = next((gain for end, gain in _GAINS.items() if layer.endswith(end)), 1.0)
    return 0.0, gain / math.sqrt(fan_in)
