"""Q/DQ insertion: a graph and its calibration in, a graph with quantized linears out.

A weight is stored as quantized values followed by a DequantizeLinear, which takes a half or a quarter of the bytes of
bfloat16. A quantized input passes through a QuantizeLinear and a DequantizeLinear, whose scale comes from the
calibration. This is explicit quantization as ONNX defines it: TensorRT fuses the pairs into 8-bit kernels, onnxruntime
executes them as they are.

No function here changes the graph that it is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import attention_input_names, attention_nodes, excluded, linear_nodes, linears
from qie.compiler.quantization.schemes import ATTENTION, SCHEMES, Scheme
from qie.compiler.quantization.smoothing import Group, smoothing_groups
from qie.compiler.recipe.schema import ComponentRecipe, SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.compiler.weights.weight import DType, Weight
from qie.engines.errors import RecipeError

Array = NDArray[np.float32]

__all__ = ["Quantized", "insert_qdq", "quantize_by_recipe", "quantize_linears"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantized:
    """A quantized graph.

    Attributes:
        graph: the graph with Q/DQ.
        linears: names of the quantized linears.
        groups: groups of linears that are smoothed.
        smoothing_scales: group -> smoothing scales [channels], which must be in the weights (``smoothed_reader``).
    """

    graph: Graph
    linears: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    smoothing_scales: Mapping[str, Array] = field(default_factory=dict)


def quantize_by_recipe(
    graph: Graph, section: ComponentRecipe, calibration: Calibration | None, language: LanguageConfig
) -> Quantized:
    """Quantize ``graph`` as ``section`` of a recipe says.

    The linears to exclude are those that the calibration measured for the scheme, or those of the recipe where it did
    not.

    Args:
        graph: the graph of one component.
        section: the section of the recipe for that component.
        calibration: statistics of the model. Without it, scales of inputs are placeholders: the graph can be counted
            and not be run.
        language: config of the language model.

    Raises:
        RecipeError: a pattern of ``exclude`` matches no linear, or every linear is excluded.
        CalibrationError: the calibration lacks a linear.
    """
    if section.attention == "fp8":
        graph = _quantize_attention(graph, calibration)
    if section.scheme == "none":
        return Quantized(graph=graph, linears=())
    measured = None if calibration is None else calibration.exclude.get(f"{graph.component}/{section.scheme}")
    exclude = excluded(graph, section.exclude) if measured is None else tuple(measured)
    names = [name for name in linears(graph) if name not in exclude]
    if not names:
        raise RecipeError(
            f'components.{graph.component}.exclude leaves no linear to quantize; shorten it, or set scheme to "none"'
        )
    return quantize_linears(graph, section.scheme, names, calibration, language)


def quantize_linears(
    graph: Graph,
    scheme_name: SchemeName,
    names: Sequence[str],
    calibration: Calibration | None,
    language: LanguageConfig,
) -> Quantized:
    """Quantize the linears ``names`` of ``graph``; see ``quantize_by_recipe``.

    Raises:
        CalibrationError: the calibration lacks a linear.
    """
    scheme = SCHEMES[scheme_name]
    if calibration is None:
        return Quantized(graph=insert_qdq(graph, scheme, names, dict.fromkeys(names, 1.0), {}), linears=tuple(names))
    calibration.check_linears(names)
    is_smoothed = graph.component in scheme.smoothed
    scales = calibration.smoothing_scales.get(scheme_name, {}) if is_smoothed else {}
    groups = tuple(
        group
        for group in smoothing_groups(graph.component, linears(graph), language)
        if group.name in scales and not set(names).isdisjoint(group.consumers)
    )
    expanded = {name: group.expand(scales[group.name]) for group in groups for name in group.consumers}
    divisors = {name: expanded[name] for group in groups if not group.producers for name in group.consumers}
    amax = {name: float((calibration.amax[name] / expanded.get(name, np.float32(1))).max()) for name in names}
    return Quantized(
        graph=insert_qdq(graph, scheme, names, amax, divisors),
        linears=tuple(names),
        groups=groups,
        smoothing_scales={group.name: scales[group.name] for group in groups},
    )


def insert_qdq(
    graph: Graph, scheme: Scheme, names: Sequence[str], amax: Mapping[str, float], divisors: Mapping[str, Array]
) -> Graph:
    """A copy of ``graph`` with Q/DQ around the linears ``names``, and its new weights.

    Args:
        graph: the graph to copy.
        scheme: quantizers of weights and inputs.
        names: linears to quantize.
        amax: largest magnitude of each linear's input, after the division by ``divisors``; read where the scheme
            quantizes inputs.
        divisors: linear -> scales [in] by which the graph divides the linear's input.
    """
    graph = replace(graph, model=graph.model.clone())
    weights: dict[str, tuple[Weight, ...]] = {weight.name: (weight,) for weight in graph.weights}
    writer = _Writer(graph)
    for node, x, parameter in list(linear_nodes(graph)):
        name = str(parameter.name).removesuffix(".weight")
        if name in divisors:
            x = writer.divide(node, name, x, divisors[name])
        if name in names:
            if scheme.inputs is not None:
                x = writer.fake_quantize(node, name, x, scheme.inputs, amax[name])
            stored = _quantized_weight(weights[str(parameter.name)][0], scheme.weights, graph.dtype)
            weights[stored[0].name] = stored
            node.replace_input_with(1, writer.dequantize(node, *stored))
        node.replace_input_with(0, x)
    return replace(graph, weights=tuple(weight for stored in weights.values() for weight in stored))


def _quantize_attention(graph: Graph, calibration: Calibration | None) -> Graph:
    """A copy of ``graph`` with queries, keys and values fake-quantized to FP8."""
    graph = replace(graph, model=graph.model.clone())
    writer, nodes = _Writer(graph), list(attention_nodes(graph))
    if calibration is not None:
        calibration.check_linears([name for _, attention, _ in nodes for name in attention_input_names(attention)])
    for node, attention, values in nodes:
        for index, (name, value) in enumerate(zip(attention_input_names(attention), values, strict=True)):
            amax = 1.0 if calibration is None else float(calibration.amax[name].max())
            node.replace_input_with(index, writer.fake_quantize(node, name, value, ATTENTION, amax))
    return graph


def _quantized_weight(weight: Weight, quantizer: Quantizer, dtype: DType) -> tuple[Weight, Weight]:
    """The parameters that hold the quantized values of ``weight`` and their scales.

    Scales of groups have the dtype in which the graph computes, the only one that TensorRT accepts.
    """
    values = replace(weight, dtype=quantizer.dtype, quantizer=quantizer)
    scales = replace(
        weight,
        name=f"{weight.name}.scale",
        shape=quantizer.scale_shape(weight.shape),
        dtype=dtype if quantizer.per == "group" else "float32",
        quantizer=quantizer,
        scale_of=weight.name,
    )
    return values, scales


class _Writer:
    """Inserts nodes into the model of a graph; linears with one input share the nodes inserted behind it."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.dtype = graph.model.graph, DTYPES[graph.dtype]
        self.inserted: dict[Any, ir.Value] = {}
        self.count = 0

    def divide(self, node: ir.Node, name: str, x: ir.Value, scales: Array) -> ir.Value:
        """``x`` divided by ``scales`` [channels], as a multiplication by their inverse."""
        key = ("divide", x.name, scales.tobytes())
        if key not in self.inserted:
            inverse = self.constant(f"{name}.inverse_factors", 1 / scales, self.dtype)
            self.inserted[key] = self.node(node, "Mul", [x, inverse], self.dtype)
        return self.inserted[key]

    def fake_quantize(self, node: ir.Node, name: str, x: ir.Value, quantizer: Quantizer, amax: float) -> ir.Value:
        """``x`` through QuantizeLinear and DequantizeLinear, with the scale for ``amax``."""
        scale = quantizer.scale_from_amax(amax)
        key = ("fake_quantize", x.name, quantizer, scale.tobytes())
        if key not in self.inserted:
            constant = self.constant(f"{name}.input_scale", scale, ir.DataType.FLOAT)
            quantized_dtype = DTYPES[quantizer.dtype]
            quantized = self.node(
                node, "QuantizeLinear", [x, constant], quantized_dtype, {"output_dtype": int(quantized_dtype)}
            )
            self.inserted[key] = self.node(
                node, "DequantizeLinear", [quantized, constant], self.dtype, {"output_dtype": int(self.dtype)}
            )
        return self.inserted[key]

    def dequantize(self, node: ir.Node, values: Weight, scales: Weight) -> ir.Value:
        """The weight of which ``values`` and ``scales`` are stored."""
        quantizer = values.quantizer
        assert quantizer is not None
        parameters = []
        for weight in (values, scales):
            value = ir.Value(name=weight.name, type=ir.TensorType(DTYPES[weight.dtype]), shape=ir.Shape(weight.shape))
            self.graph.initializers[weight.name] = value
            parameters.append(value)
        attributes = {"output_dtype": int(self.dtype)}
        if quantizer.per != "tensor":
            attributes["axis"] = 1 if quantizer.per == "channel" else 0
        if quantizer.per == "group":
            attributes["block_size"] = quantizer.group_size
        return self.node(node, "DequantizeLinear", parameters, self.dtype, attributes)

    def constant(self, name: str, values: Any, dtype: ir.DataType) -> ir.Value:
        """A constant tensor of the graph."""
        tensor = ir.tensor(np.asarray(values, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(np.shape(values)), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """The output, of ``dtype``, of a new node that is inserted in front of ``before`` and into its scope."""
        self.count += 1
        name = f"{before.name}.{op_type}_{self.count}"
        node = ir.node(op_type, inputs=inputs, attributes=attributes, num_outputs=1, name=name)
        node.metadata_props.update(before.metadata_props)
        self.graph.insert_before(before, node)
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{name}.output", ir.TensorType(dtype), inputs[0].shape
        return output
