"""Q/DQ insertion: a graph and its calibration in, a graph with quantized linears out.

A weight is stored as quantized values followed by a DequantizeLinear, which takes a half or a quarter of the bytes of
bfloat16. A quantized input passes through a QuantizeLinear and a DequantizeLinear, whose scale comes from the
calibration. This is explicit quantization as ONNX defines it: TensorRT fuses the pairs into 8-bit kernels, onnxruntime
executes them as they are.

Where a scheme quantizes inputs and has a scale per output channel, the DequantizeLinear of the weight has the scale 1
and the graph multiplies the product by the scales of the channels. The result is the same, but TensorRT writes products
in float32 if the DequantizeLinear of the weight has scales per channel, and in the dtype of the graph if it has one.

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

FLOAT = ir.DataType.FLOAT

UNIT_SCALE = "unit_scale"
"""Name of the constant 1 in a quantized graph."""

__all__ = ["Quantized", "insert_qdq", "quantize_by_recipe", "quantize_linears"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantized:
    """A quantized graph.

    Attributes:
        graph: the graph with Q/DQ.
        linears: names of the quantized linears.
        groups: groups of linears that are smoothed.
        smoothing_scales: group -> smoothing scales [channels], which must be in the weights (``smoothed_reader``).
        amax: largest magnitude of the input of each quantized linear, after smoothing; 1 without a calibration.
    """

    graph: Graph
    linears: tuple[str, ...]
    amax: Mapping[str, float] = field(default_factory=dict)
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
    if not names and measured is not None and calibration is not None:
        raise RecipeError(
            f"{calibration.source} excludes every linear of {graph.component}; calibrate again with a larger budget, "
            'or set scheme to "none"',
            option="calibration",
        )
    if not names:
        raise RecipeError(
            f"components.{graph.component}.exclude of the recipe leaves none of the {len(linears(graph))} linears of "
            'this model to quantize; shorten it in a recipe of your own, or set scheme to "none" there'
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
        amax = dict.fromkeys(names, 1.0)
        return Quantized(graph=insert_qdq(graph, scheme, names, amax, {}), linears=tuple(names), amax=amax)
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
        amax=amax,
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
    for node, _, parameter in list(linear_nodes(graph)):
        name, x = str(parameter.name).removesuffix(".weight"), node.inputs[0]
        assert x is not None
        if name in divisors:
            x = writer.divide(node, name, x, divisors[name])
        if name in names:
            if scheme.inputs is not None:
                x = writer.fake_quantize(node, name, x, scheme.inputs, amax[name])
            stored = _quantized_weight(weights[str(parameter.name)][0], scheme.weights, graph.dtype)
            weights[stored[0].name] = stored
            values, scales = map(writer.parameter, stored)
            if scheme.scales_products:
                writer.scale_product(node, f"{name}.bias", scales)
                scales = writer.one()
            node.replace_input_with(1, writer.dequantize(node, values, scales, scheme.weights))
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
            constant = self.constant(f"{name}.input_scale", scale, FLOAT)
            quantized_dtype = DTYPES[quantizer.dtype]
            quantized = self.node(
                node, "QuantizeLinear", [x, constant], quantized_dtype, {"output_dtype": int(quantized_dtype)}
            )
            self.inserted[key] = self.node(
                node, "DequantizeLinear", [quantized, constant], self.dtype, {"output_dtype": int(self.dtype)}
            )
        return self.inserted[key]

    def parameter(self, weight: Weight) -> ir.Value:
        """The initializer that ``weight`` is stored in."""
        value = ir.Value(name=weight.name, type=ir.TensorType(DTYPES[weight.dtype]), shape=ir.Shape(weight.shape))
        self.graph.initializers[weight.name] = value
        return value

    def one(self) -> ir.Value:
        """The scale 1."""
        if UNIT_SCALE not in self.graph.initializers:
            self.constant(UNIT_SCALE, 1, FLOAT)
        return self.graph.initializers[UNIT_SCALE]

    def dequantize(self, node: ir.Node, values: ir.Value, scales: ir.Value, quantizer: Quantizer) -> ir.Value:
        """``values`` times ``scales``, which are one for all of them or as ``quantizer`` says."""
        attributes = {"output_dtype": int(self.dtype)}
        if len(scales.shape or ()):
            attributes["axis"] = 1 if quantizer.per == "channel" else 0
        if quantizer.per == "group":
            attributes["block_size"] = quantizer.group_size
        return self.node(node, "DequantizeLinear", [values, scales], self.dtype, attributes)

    def scale_product(self, product: ir.Node, bias: str, scales: ir.Value) -> None:
        """Multiply the output of ``product`` by ``scales`` [out], and add ``bias`` where the graph does, in float32.

        Args:
            product: a MatMul by a weight.
            bias: name of the parameter that an Add behind ``product`` may add to it.
            scales: float32.
        """
        exact = product.outputs[0]
        readers = tuple(exact.uses())
        result = self.node(product, "Mul", [self.cast(product, exact, FLOAT), scales], FLOAT, behind=True)
        if bias in self.graph.initializers:
            ((add, index),) = readers
            summand = add.inputs[1 - index]
            assert summand is not None
            assert summand.name == bias
            readers = tuple(add.outputs[0].uses())
            add.replace_input_with(index, result)
            add.replace_input_with(1 - index, self.cast(add, summand, FLOAT, behind=False))
            result = add.outputs[0]
            result.type = ir.TensorType(FLOAT)
        result = self.cast(product, result, self.dtype)
        for reader, index in readers:
            reader.replace_input_with(index, result)

    def cast(self, scope: ir.Node, x: ir.Value, dtype: ir.DataType, *, behind: bool = True) -> ir.Value:
        """``x`` in ``dtype``, which is float32 or that of the graph; ``x`` itself in a graph of float32."""
        return x if self.dtype == FLOAT else self.node(scope, "Cast", [x], dtype, {"to": int(dtype)}, behind=behind)

    def constant(self, name: str, values: Any, dtype: ir.DataType) -> ir.Value:
        """A constant tensor of the graph."""
        tensor = ir.tensor(np.asarray(values, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(np.shape(values)), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def node(
        self,
        scope: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        attributes: Mapping[str, int] | None = None,
        *,
        behind: bool = False,
    ) -> ir.Value:
        """The output, of ``dtype``, of a new node in the scope of ``scope``.

        The node is inserted in front of ``scope``, or right ``behind`` the node that computes its first input.
        """
        self.count += 1
        name = f"{scope.name}.{op_type}_{self.count}"
        node = ir.node(op_type, inputs=inputs, attributes=attributes, num_outputs=1, name=name)
        node.metadata_props.update(scope.metadata_props)
        if behind:
            producer = inputs[0].producer()
            assert producer is not None
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(scope, node)
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{name}.output", ir.TensorType(dtype), inputs[0].shape
        return output
