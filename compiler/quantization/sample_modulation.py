"""The modulation of calibration samples, computed block by block, just before a block runs.

Shape suffixes: K samples, L layers, M modulation values of a block, O modulation values of the output norm.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization.blockwise import Segment, Values
from qie.compiler.weights.modulation import CheckpointModulation
from qie.engines.bundle.modulation_rows import EMBEDDER, MODULES, NORM_OUT
from qie.engines.inputs.modulation import (
    ModulationInputs,
    ModulationWeights,
    block_rows,
    modulation_inputs,
    output_rows,
    timesteps,
)
from qie.engines.progress import Progress

__all__ = ["SampleModulation"]

_BLOCK = re.compile(r"transformer_blocks\.(\d+)")


class SampleModulation:
    """The transformer's modulation inputs of every sample, zeros until they are computed; a ``Preparation``.

    Attributes:
        blocks: float32 [K, L, M]; one array of each sample is an input of the transformer.
        out: float32 [K, O].
    """

    def __init__(self, config: TransformerConfig, reader: TensorReader, sigmas: Sequence[float]) -> None:
        """Of samples at ``sigmas``; no tensor is read."""
        self.blocks = np.zeros((len(sigmas), config.layers, config.modulation_rows * config.width), np.float32)
        self.out = np.zeros((len(sigmas), 2 * config.width), np.float32)
        self._config, self._reader = config, reader
        self._timesteps = timesteps(np.array([*sigmas, 0], np.float32))
        self._inputs: ModulationInputs | None = None
        self._asked = False

    def compute(self, progress: Progress) -> None:
        """Read the weights and compute all of it."""
        weights = CheckpointModulation(self._config, self._reader)
        for layer in range(self._config.layers):
            self._compute_block(layer, weights)
            progress("modulation", layer + 1, self._config.layers)
        self._compute_out(weights)

    def names(self, segment: Segment) -> tuple[str, ...]:
        """The tensors that ``segment`` of the transformer needs; the first one asked for needs the embedder too."""
        linears = [] if self._asked else list(EMBEDDER)
        self._asked = True
        block = _BLOCK.fullmatch(segment.name)
        if block:
            linears += [f"transformer_blocks.{block[1]}.{module}.1" for module in dict.fromkeys(MODULES.values())]
        if "modulation_out" in segment.reads:
            linears.append(NORM_OUT)
        return tuple(f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias"))

    def prepare(self, segment: Segment, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Compute what ``segment`` of the transformer reads."""
        weights = CheckpointModulation(self._config, self._reader, tensors)
        self._of_steps(weights)
        block = _BLOCK.fullmatch(segment.name)
        if block:
            self._compute_block(int(block[1]), weights)
        if "modulation_out" in segment.reads:
            self._compute_out(weights)

    def restore(self, samples: Sequence[Values]) -> None:
        """Give the samples their modulation inputs."""
        for number, values in enumerate(samples):
            values |= {"modulation": self.blocks[number], "modulation_out": self.out[number : number + 1]}

    def _compute_block(self, layer: int, weights: ModulationWeights) -> None:
        self.blocks[:, layer] = block_rows(weights, self._config, self._of_steps(weights), layer)

    def _compute_out(self, weights: ModulationWeights) -> None:
        self.out[:] = output_rows(weights, self._config, self._of_steps(weights))

    def _of_steps(self, weights: ModulationWeights) -> ModulationInputs:
        if self._inputs is None:
            self._inputs = modulation_inputs(weights, self._timesteps)
        return self._inputs
