"""How a text encoder is stored for vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

from qie.compiler.checkpoint.model import Model
from qie.compiler.weights.weight import DType, Weight
from qie.engines.bundle.manifest import Component

__all__ = ["BLOCK", "Settings"]

BLOCK = 128
"""Tokens of the largest block of a key-value cache: that of vLLM 0.32 on a CPU (platforms/cpu.py); 16 on a GPU."""

SPARE_BLOCKS = 2
"""Blocks beside those of the longest prompt; vLLM keeps one that is empty (v1/core/block_pool.py, ``null_block``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The text encoder of one bundle.

    Attributes:
        model: the model.
        dtype: of all tensors, in which vLLM computes.
        positions: tokens of the longest prompt, the template's prefix included.
        components: those that vLLM runs; the vision tower's weights are stored only where it is among them.
        weights: of the graphs of these components.
    """

    model: Model
    dtype: DType
    positions: int
    components: tuple[Component, ...]
    weights: Sequence[Weight]

    @property
    def images(self) -> int:
        """Images of a prompt; 0 where vLLM only takes embeddings of images, and needs no vision tower."""
        return self.model.references_max if "vision" in self.components else 0

    @property
    def cache_bytes(self) -> int:
        """Size of a key-value cache for one prompt: keys and values of every layer, in whole blocks."""
        language = self.model.language
        tokens = (-(-self.positions // BLOCK) + SPARE_BLOCKS) * BLOCK
        size = 4 if self.dtype == "float32" else 2
        return 2 * language.layers * language.kv_heads * language.head_dim * size * tokens
