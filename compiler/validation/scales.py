"""The scales of a quantized ONNX graph against the calibration in its bundle: of inputs, and of smoothing."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.quantization.smoothing import Group, smoothing_groups
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.onnx_file import calibration_of, linears_of, quantized_linears, read_graph
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord, GraphRecord

__all__ = ["wrong_scales"]

Array = NDArray[np.float32]

ROUNDED = 1e-6, 1e-2
"""Relative difference of a scale, which is float32, and of a factor, which has the dtype of the graph."""


def wrong_scales(bundle: Bundle, engine: EngineRecord | GraphRecord, recipe: Recipe) -> tuple[int, list[str]]:
    """Number of quantized inputs of the graph of ``engine``, and of what is not the calibration's a sentence each.

    Compared are the scales by which inputs of linears are quantized and dequantized, and the factors by which the graph
    smooths inputs. Without a calibration, and where a scheme quantizes weights alone, there is nothing to compare.
    """
    section, calibration = recipe.components[engine.component], calibration_of(bundle)
    inputs = None if section.scheme == "none" else SCHEMES[section.scheme].inputs
    if inputs is None or calibration is None:
        return 0, []
    graph = bundle.folder.read(lambda folder: read_graph(folder / engine.path)).graph
    linears = linears_of(engine, graph)
    smoothing = calibration.smoothing_scales.get(section.scheme, {})
    if engine.component not in SCHEMES[section.scheme].smoothed:
        smoothing = {}
    quantized = quantized_linears(bundle, engine, recipe, linears)
    smoothed = dict(_smoothed(smoothing_groups(engine.component, linears), smoothing, quantized))
    found = _Inputs(graph)
    count = 0
    problems = [
        f"{engine.component}: the input of {name} is not quantized"
        for name in sorted(quantized - found.quantized.keys())
    ]
    for name in sorted(quantized):
        if name not in found.quantized:
            problems.append(f"{engine.component}: the input of {name} is not quantized")
            continue
        count += 1
        divisor = smoothed.get(name)
        expected = 1.0 if divisor is None else divisor[0]
        if np.size(expected) not in (1, len(calibration.amax[name])):
            continue  # grouped heads, whose scales belong to other channels
        scale = float(inputs.scale_from_amax(float((calibration.amax[name] / expected).max())))
        for verb, value in found.quantized[name].items():
            if not np.isclose(value, scale, rtol=ROUNDED[0], atol=0):
                found_scale = f"the input of {name} is {verb} by {value:.4g}"
                problems.append(f"{engine.component}: {found_scale}, the calibration says {scale:.4g}")
        if divisor is not None and divisor[1]:
            factors = found.factors.get(name)
            if factors is None or not np.allclose(factors * divisor[0], 1, rtol=ROUNDED[1], atol=0):
                problems.append(f"{engine.component}: the input of {name} is not divided by its smoothing scales")
    problems += [f"{engine.component}: {name} has a zero point" for name in found.shifted]
    return count, problems


def _smoothed(
    groups: tuple[Group, ...], scales: Mapping[str, Array], quantized: set[str]
) -> Iterator[tuple[str, tuple[Array, bool]]]:
    """The smoothing scales of the input of each linear, and whether the graph itself divides by them."""
    for group in groups:
        if group.name in scales and not quantized.isdisjoint(group.consumers):
            for name in group.consumers:
                yield name, (scales[group.name], not group.producers)


class _Inputs:
    """What a graph does to the inputs of its linears.

    Attributes:
        quantized: linear -> the scales by which its input is ``quantized`` and ``dequantized``.
        factors: linear -> the constant by which its input is multiplied before.
        shifted: nodes that have a zero point.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        writers = {name: node for node in graph.node for name in node.output}
        constants = {t.name: t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
        self.quantized: dict[str, dict[str, float]] = {}
        self.factors: dict[str, Array] = {}
        both = ("QuantizeLinear", "DequantizeLinear")
        self.shifted = [n.name for n in graph.node if n.op_type in both and len(n.input) > 2 and n.input[2]]

        def value(name: str) -> Array:
            return np.asarray(onnx.numpy_helper.to_array(constants[name]), np.float32)

        for product in graph.node:
            weight = writers.get(product.input[1]) if product.op_type == "MatMul" else None
            behind = writers.get(product.input[0]) if weight is not None else None
            if weight is None or behind is None or {weight.op_type, behind.op_type} != {"DequantizeLinear"}:
                continue
            name, front = weight.input[0].removesuffix(".weight"), writers[behind.input[0]]
            self.quantized[name] = {
                "quantized": float(value(front.input[1])),
                "dequantized": float(value(behind.input[1])),
            }
            factor = writers.get(front.input[0])
            if factor is not None and factor.op_type == "Mul" and factor.input[1] in constants:
                self.factors[name] = value(factor.input[1])
