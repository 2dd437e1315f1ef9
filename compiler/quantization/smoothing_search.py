"""The search for the smoothing of a group: every alpha is tried on rows of inputs and on columns of the weights.

Weights are tried transposed, as [columns, in], so that a block of them is scaled, quantized and multiplied while it is
in the cache of a core.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qie.compiler.quantization.schemes import Scheme
from qie.compiler.quantization.smoothing import Group, smoothing_scales
from qie.compiler.weights.quantizer import Quantizer

__all__ = ["Observed", "best_smoothing", "largest_magnitudes"]

ALPHAS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The values of alpha that are tried for every group."""

COLUMNS = 768
"""Output channels of a linear on which a smoothing is tried. The error is a mean over them, and each is quantized with
a scale of its own, so that a part tells what all do."""

MAX_ERROR_RATIO = 0.95
"""A smoothing that costs a multiplication must bring the error below this share of the error without it."""

CACHED = 1 << 19
"""Elements of a block of a weight."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Observed:
    """What was seen of the input of a linear.

    Attributes:
        rows: rows [R, in] of the samples that a smoothing is judged on; one array for linears with one input.
        fitted_amax: largest magnitudes [in] of the samples that a smoothing is fitted to.
        amax: largest magnitudes [in] of all samples.
    """

    rows: Array
    fitted_amax: Array
    amax: Array


def best_smoothing(
    group: Group, scheme: Scheme, observed: Mapping[str, Observed], weights: Mapping[str, Array]
) -> tuple[float, Array] | None:
    """Alpha and scales with the least error, or None where the group is as good without smoothing.

    Scales follow the amax of inputs where the scheme quantizes these (SmoothQuant), their mean magnitude where it
    does not (AWQ). Scales are fitted to every other sample and judged on the rest, because a channel that fills its
    range is clipped where another sample has more of it. The scales of the chosen alpha are then fitted to all samples.

    Args:
        group: the linears.
        scheme: how they are quantized.
        observed: linear -> what was seen of its input.
        weights: linear -> weight [in, out].
    """
    names = group.consumers
    if scheme.inputs is None:
        inputs = np.mean([np.abs(observed[name].rows).mean(0) for name in names], axis=0)
    else:
        inputs = np.max([observed[name].fitted_amax for name in names], axis=0)
    widest = np.max([largest_magnitudes(weights[name].T) for name in names], axis=0)
    inputs, widest = group.reduce_max(inputs), group.reduce_max(widest)
    trial = _Trial(scheme, observed, {name: _some_columns(name, weights[name]) for name in names})
    least = trial.error(np.ones(group.expand(inputs).shape, np.float32))
    least *= 1.0 if group.producers else MAX_ERROR_RATIO
    best_alpha = None
    for alpha in ALPHAS:
        error = trial.error(group.expand(smoothing_scales(inputs, widest, alpha)))
        if error < least:
            least, best_alpha = error, alpha
    if best_alpha is None:
        return None
    if scheme.inputs is not None:
        inputs = group.reduce_max(np.max([observed[name].amax for name in names], axis=0))
    return best_alpha, smoothing_scales(inputs, widest, best_alpha)


def largest_magnitudes(x: Array) -> Array:
    """The largest magnitude in each column, without a copy of all magnitudes."""
    return np.maximum(x.max(0), -x.min(0)) + np.float32(0)  # never -0


class _Trial:
    """Linears that are quantized with one scale after another, and what they compute exactly."""

    def __init__(self, scheme: Scheme, observed: Mapping[str, Observed], weights: Mapping[str, Array]) -> None:
        """Of weights [columns, in]."""
        self._scheme, self._observed, self._weights = scheme, observed, weights
        self._exact = {name: observed[name].rows @ weight.T for name, weight in weights.items()}
        self._power = {name: float(np.vdot(exact, exact)) or 1.0 for name, exact in self._exact.items()}
        self._scratch = np.empty(max(CACHED, *(weight.shape[1] for weight in weights.values())), np.float32)

    def error(self, scales: Array) -> float:
        """The relative squared error of the products with inputs divided by ``scales`` [in]; a sum over linears."""
        inputs: dict[int, Array] = {}
        total = 0.0
        for name, weight in self._weights.items():
            seen = self._observed[name]
            if id(seen.rows) not in inputs:
                inputs[id(seen.rows)] = self._input(seen, scales)
            x, squares = inputs[id(seen.rows)], 0.0
            step = max(1, CACHED // weight.shape[1])
            for start in range(0, len(weight), step):
                part = weight[start : start + step]
                scaled = self._scratch[: part.size].reshape(part.shape)
                np.multiply(part, scales, out=scaled)
                _fake_quantize(self._scheme.weights, scaled)
                difference = x @ scaled.T
                difference -= self._exact[name][:, start : start + step]
                squares += float(np.vdot(difference, difference))
            total += squares / self._power[name]
        return total

    def _input(self, seen: Observed, scales: Array) -> Array:
        x = seen.rows / scales
        quantizer = self._scheme.inputs
        if quantizer is None:
            return x
        return quantizer.fake_quantize(x, quantizer.scale_from_amax((seen.fitted_amax / scales).max()))


def _fake_quantize(quantizer: Quantizer, weight: Array) -> None:
    """Quantize and dequantize ``weight`` [columns, in] in place, as ``Quantizer.fake_quantize`` does its transpose."""
    columns, width = weight.shape
    size = quantizer.group_size if quantizer.per == "group" else width
    if quantizer.per == "tensor" or quantizer.dtype == "float8_e4m3fn" or width % size:
        weight[:] = quantizer.fake_quantize(weight.T).T
        return
    values = weight.reshape(columns, width // size, size)
    scale = quantizer.scale_from_amax(np.maximum(values.max(2), -values.min(2)))[..., None]
    values /= scale
    np.rint(values, out=values)
    if quantizer.bf16_scales:  # which may be smaller than the amax needs
        np.clip(values, -quantizer.qmax - 1, quantizer.qmax, out=values)
    values *= scale


def _some_columns(name: str, weight: Array) -> Array:
    """Columns of the weight [in, out] of the linear ``name``, at most ``COLUMNS``, for one name always the same ones;
    transposed: [columns, in]."""
    if weight.shape[1] > COLUMNS:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        weight = weight[:, np.sort(rng.choice(weight.shape[1], COLUMNS, replace=False))]
    return np.ascontiguousarray(weight.T)
