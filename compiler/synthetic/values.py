"""Values of a synthetic tensor in bfloat16, made piece by piece by any number of threads.

A piece is a number of whole rows, and its random bits depend on the seed, the tensor's name and the piece's number
alone, so that no order of work changes a byte. ``u`` of 16 bits, uniform in [-1, 1), becomes ``u + 2 u^3``: a bell
that ends at 2.3 standard deviations, from one product of a cubic. It is rounded toward zero to bfloat16.

Like weights of trained models, a few channels are ``LARGEST`` times as large as others or less: input channels of down
projections and modulations, output channels of the modulations' scales, and channels of the language model's norms.
Other weights of a tensor with large input channels are smaller in return, so that its outputs keep their size.
"""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import Shape
from qie.compiler.synthetic.scales import center_and_std

__all__ = ["LARGEST", "SMALLEST", "TensorValues"]

SMALLEST, LARGEST = 10, 50
"""Bounds of how many times as large as others an outlier channel is."""

_LARGE_INPUTS = ("img_mod.1.weight", "txt_mod.1.weight", "mlp.net.2.weight", "mlp.down_proj.weight")
_LARGE_OUTPUTS = ("img_mod.1.weight", "txt_mod.1.weight")
_LARGE_GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight")

_SCALES_OF_SIX = (1, 4)
"""Which sixths of a modulation's outputs are scales: shift, scale and gate of attention, then of the feed-forward."""

_CHANNELS_AN_OUTLIER = 1024
_PIECE = 1 << 20
_BLOCK = 1 << 17
"""Values that are made at once: many to an operation, and few enough for a core's cache. They decide the bytes."""

_STD = math.sqrt(1 / 3 + 4 / 5 + 4 / 7)
"""Standard deviation of ``u + 2 u^3``."""

_Channels = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Channels, and how many times as large they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorValues:
    """The values of one tensor.

    Attributes:
        subfolder: where the tensor belongs.
        name: its canonical name.
        shape: PyTorch's.
        seed: of the checkpoint.
    """

    subfolder: Subfolder
    name: str
    shape: Shape
    seed: int
    _large_inputs: _Channels = field(init=False, repr=False)
    _large_outputs: _Channels = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows, width = self._matrix
        inputs = self._draw("inputs", width, 0, _LARGE_INPUTS + _LARGE_GAINS)
        object.__setattr__(self, "_large_inputs", inputs)
        sixth = rows // 6
        drawn = [self._draw(f"outputs {part}", sixth, part * sixth, _LARGE_OUTPUTS) for part in _SCALES_OF_SIX]
        outputs = (np.concatenate([channels for channels, _ in drawn]), np.concatenate([times for _, times in drawn]))
        object.__setattr__(self, "_large_outputs", outputs)

    @property
    def pieces(self) -> int:
        """How many pieces there are."""
        return -(-self._matrix[0] // self._rows_of(_PIECE))

    @property
    def outliers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Large input channels (of a vector: its large elements) and large output channels."""
        return tuple(self._large_inputs[0].tolist()), tuple(self._large_outputs[0].tolist())

    def piece(self, number: int) -> memoryview:
        """The bytes of a piece.

        Args:
            number: of the piece, less than ``pieces``.
        """
        rows, width = self._matrix
        first = number * self._rows_of(_PIECE)
        last = min(rows, first + self._rows_of(_PIECE))
        center, _ = center_and_std(self.subfolder, self.name, self.shape)
        largest = 2 * self._std / _STD
        factor, linear = np.float32(math.pow(largest, 1 / 3)), np.float32(math.pow(largest, 2 / 3) / 2)
        generator = self._generator(f"piece {number}")
        out = np.empty((last - first, width), np.uint16)
        values = np.empty((min(self._rows_of(_BLOCK), last - first), width), np.float32)
        cubic = np.empty_like(values)
        for start in range(first, last, len(values)):
            stop = min(start + len(values), last)
            count = (stop - start) * width
            block, term = values[: stop - start], cubic[: stop - start]
            bits = generator.random_raw((count + 3) // 4).view(np.int16)[:count].reshape(block.shape)
            np.multiply(bits, factor * np.float32(2.0**-15), out=block)
            np.multiply(block, block, out=term)
            term += linear
            block *= term
            if center:
                block += np.float32(center)
            self._enlarge(block, start, stop)
            out[start - first : stop - first] = block.view(np.uint16)[:, 1::2]
        return out.reshape(-1).view(np.uint8).data

    @property
    def _matrix(self) -> tuple[int, int]:
        """Rows, and values of a row; a vector is one row."""
        return (1, self.shape[0]) if len(self.shape) == 1 else (self.shape[0], math.prod(self.shape[1:]))

    @property
    def _std(self) -> float:
        """Standard deviation without outliers; large input channels leave the outputs' as it was."""
        std = center_and_std(self.subfolder, self.name, self.shape)[1]
        if len(self.shape) == 1:
            return std
        times, width = self._large_inputs[1].astype(np.float64), self._matrix[1]
        return std / math.sqrt((width - len(times) + float((times * times).sum())) / width)

    def _rows_of(self, values: int) -> int:
        return max(1, values // self._matrix[1])

    def _generator(self, purpose: str) -> np.random.SFC64:
        text = f"{self.seed} {self.subfolder} {self.name} {purpose}"
        return np.random.SFC64(int.from_bytes(hashlib.sha256(text.encode()).digest()))

    def _draw(self, purpose: str, channels: int, offset: int, ends: tuple[str, ...]) -> _Channels:
        """Channels of ``channels`` after ``offset``, none where the name has another end."""
        count = max(1, channels // _CHANNELS_AN_OUTLIER) if self.name.endswith(ends) else 0
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        drawn = self._generator(purpose).random_raw(4 * count)
        chosen = list(dict.fromkeys((drawn[: 3 * count] % np.uint64(channels)).tolist()))[:count]
        times = drawn[3 * count :][: len(chosen)] % np.uint64(LARGEST - SMALLEST + 1) + np.uint64(SMALLEST)
        return np.array(chosen, np.int64) + offset, times.astype(np.float32)

    def _enlarge(self, block: NDArray[np.float32], start: int, stop: int) -> None:
        """Multiply the outlier channels of a block, the rows from ``start`` to ``stop``."""
        channels, times = self._large_inputs
        if len(channels):
            block[:, channels] *= times
        for row, factor in zip(*self._large_outputs, strict=True):
            if start <= row < stop:
                block[row - start] *= factor
