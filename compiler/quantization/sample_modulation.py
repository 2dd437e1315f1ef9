"""The modulation of calibration samples, computed block by block, just before a block runs.

Shape suffixes: K samples, L layers, M modulation values of a block, O modulation values of the output norm.
"""

import re
from collections.abc import Sequence

import numpy as np

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization.blockwise import Segment, Values
from qie.compiler.weights.modulation import CheckpointModulation
from qie.engines.inputs.modulation import block_rows, modulation_inputs, output_rows, timesteps
from qie.engines.progress import Progress

__all__ = ["SampleModulation"]

_BLOCK = re.compile(r"transformer_blocks\.(\d+)")


class SampleModulation:
    """The transformer's modulation inputs of every sample, zeros until they are computed.

    Attributes:
        blocks: float32 [K, L, M]; one array of each sample is an input of the transformer.
        out: float32 [K, O].
    """

    def __init__(self, config: TransformerConfig, reader: TensorReader, sigmas: Sequence[float]) -> None:
        """Of samples at ``sigmas``."""
        self.blocks = np.zeros((len(sigmas), config.layers, config.modulation_rows * config.width), np.float32)
        self.out = np.zeros((len(sigmas), 2 * config.width), np.float32)
        self._config, self._weights = config, CheckpointModulation(config, reader)
        self._inputs = modulation_inputs(self._weights, timesteps(np.array([*sigmas, 0], np.float32)))

    def compute(self, progress: Progress) -> None:
        """Compute all of it."""
        for layer in range(self._config.layers):
            self._compute_block(layer)
            progress("modulation", layer + 1, self._config.layers)
        self._compute_out()

    def before_segment(self, segment: Segment, samples: Sequence[Values]) -> None:
        """Compute what ``segment`` of the transformer reads."""
        block = _BLOCK.fullmatch(segment.name)
        if block:
            self._compute_block(int(block[1]))
        if "modulation_out" in segment.reads:
            self._compute_out()

    def restore(self, samples: Sequence[Values]) -> None:
        """Give the samples their modulation inputs."""
        for number, values in enumerate(samples):
            values |= {"modulation": self.blocks[number], "modulation_out": self.out[number]}

    def _compute_block(self, layer: int) -> None:
        self.blocks[:, layer] = block_rows(self._weights, self._config, self._inputs, layer)

    def _compute_out(self) -> None:
        self.out[:] = output_rows(self._weights, self._config, self._inputs)
