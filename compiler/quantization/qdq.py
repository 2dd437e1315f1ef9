"""Writes Q/DQ into a graph: statistics and graph in, a graph that computes in 8 bits out.

A weight becomes codes with a DequantizeLinear behind them, half or a quarter of the bytes; what is multiplied with it
goes through QuantizeLinear and DequantizeLinear with a scale that calibration found. That is explicit quantization
as ONNX has it: TensorRT fuses it into 8-bit kernels, onnxruntime executes it as it stands.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.smoothing import Group, groups
from qie.compiler.recipe.schema import ComponentRecipe, SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.compiler.weights.weight import DType, Weight
from qie.engines.bundle.manifest import Component
from qie.engines.errors import RecipeError

Array = NDArray[np.float32]

__all__ = [
    "QUANTIZATION",
    "Quantized",
    "Scheme",
    "apply",
    "attentions",
    "by_recipe",
    "kept",
    "linears",
    "operands",
    "products",
    "quantize",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How weights are quantized, and what they are multiplied with: not at all where ``inputs`` is None.

    ``smooth`` says that factors move what is hard to quantize between the two (``quantization.smoothing``).
    """

    weights: Quantizer
    inputs: Quantizer | None
    smooth: bool


QUANTIZATION: dict[SchemeName, Scheme] = {
    "fp8": Scheme(
        weights=Quantizer(codes="float8_e4m3fn", per="channel"), inputs=Quantizer(codes="float8_e4m3fn"), smooth=False
    ),
    "int8-smooth": Scheme(weights=Quantizer(codes="int8", per="channel"), inputs=Quantizer(codes="int8"), smooth=True),
    "w8a16": Scheme(weights=Quantizer(codes="int8", per="channel"), inputs=None, smooth=True),
    "w4a16": Scheme(weights=Quantizer(codes="int4", per="group", group=128, coarse=True), inputs=None, smooth=True),
}
"""The schemes of recipes; "none" is no scheme."""

ATTENTION = Quantizer(codes="float8_e4m3fn")
"""What queries, keys and values go through where a recipe wants attention in FP8."""

QUANTIZABLE: dict[Component, tuple[str, ...]] = {
    "transformer": ("transformer_blocks.*",),
    "language": ("language_model.layers.*",),
}
"""Component -> patterns of the linears that may be quantized: never embedders, output layers or modulation."""


def linears(graph: Graph) -> tuple[str, ...]:
    """The linears of ``graph`` that may be quantized, by the name of their weight without ``.weight``, in order."""
    return tuple(name for name in products(graph) if _in_a_block(graph, name))


def products(graph: Graph) -> dict[str, str]:
    """Linear -> the name of its input's value, of all linears of ``graph`` in order."""
    return {str(w.name).removesuffix(".weight"): str(x.name) for _, x, w in _products(graph)}


def attentions(graph: Graph) -> dict[str, tuple[str, str, str]]:
    """Attention, by the name of its module -> the names of the values that are its queries, keys and values, of the
    blocks whose linears may be quantized."""
    return {name: (str(q.name), str(k.name), str(v.name)) for _, name, (q, k, v) in _attentions(graph)}


def operands(name: str) -> tuple[str, str, str]:
    """What a calibration calls queries, keys and values of the attention ``name``."""
    return f"{name}.query", f"{name}.key", f"{name}.value"


def kept(graph: Graph, keep: Sequence[str]) -> tuple[str, ...]:
    """The linears of ``graph`` that match a pattern of ``keep``; blocks count from the end too, -1 is the last.

    Raises:
        RecipeError: a pattern matches nothing.
    """
    names = linears(graph)
    ways = _ways(names)
    found: set[str] = set()
    for pattern in keep:
        matched = {name for name in names if any(fnmatch(way, pattern) for way in ways[name])}
        if not matched:
            raise RecipeError(
                f'components.{graph.component}.exclude: "{pattern}" matches no linear of this model; they are '
                f'named like "{names[0] if names else "(none)"}"'
            )
        found |= matched
    return tuple(name for name in names if name in found)


def _ways(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Each name -> itself, and it with the number of its block counted from the end."""
    split = {name: re.split(r"\.(\d+)\.", name, maxsplit=1) for name in names}
    blocks = 1 + max((int(number) for _, number, _ in split.values()), default=0)
    return {name: (name, f"{before}.{int(number) - blocks}.{after}") for name, (before, number, after) in split.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Quantized:
    """A quantized graph, which linears are quantized in it, and the factors that its weights must have."""

    graph: Graph
    linears: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    smoothing_scales: Mapping[str, Array] = field(default_factory=dict)


def by_recipe(
    graph: Graph, section: ComponentRecipe, calibration: Calibration | None, language: LanguageConfig
) -> Quantized:
    """``graph`` as ``section`` of a recipe wants it; it is changed in place.

    What is kept is what the calibration measured, or what the recipe says where that was not measured. Without
    ``calibration`` the scales of inputs are none that anybody measured: good for counting, not for running.
    ``language`` is the config of the language model.

    Raises:
        RecipeError: ``exclude`` has a pattern that matches nothing, or nothing is left to quantize.
        CalibrationError: the calibration lacks a linear.
    """
    if section.attention == "fp8":
        _round_attention(graph, calibration)
    if section.scheme == "none":
        return Quantized(graph=graph, linears=())
    measured = None if calibration is None else calibration.exclude.get(f"{graph.component}/{section.scheme}")
    keep = kept(graph, section.exclude) if measured is None else tuple(measured)
    names = [name for name in linears(graph) if name not in keep]
    if not names:
        raise RecipeError(
            f'components.{graph.component}.exclude leaves nothing to quantize; shorten it, or set scheme to "none"'
        )
    return apply(graph, section.scheme, names, calibration, language)


def apply(
    graph: Graph,
    quantization: SchemeName,
    names: Sequence[str],
    calibration: Calibration | None,
    language: LanguageConfig,
) -> Quantized:
    """``graph``, changed in place, with the linears ``names`` quantized; see ``by_recipe``."""
    scheme = QUANTIZATION[quantization]
    if calibration is None:
        return Quantized(graph=quantize(graph, scheme, names, dict.fromkeys(names, 1.0), {}), linears=tuple(names))
    calibration.check_linears(names)
    known = calibration.smoothing_scales.get(quantization, {}) if scheme.smooth else {}
    smoothed = tuple(
        group
        for group in groups(graph.component, linears(graph), language)
        if group.name in known and not set(names).isdisjoint(group.readers)
    )
    spread = {name: group.spread(known[group.name]) for group in smoothed for name in group.readers}
    divided = {name: spread[name] for group in smoothed if not group.makers for name in group.readers}
    most = {name: float((calibration.amax[name] / spread.get(name, np.float32(1))).max()) for name in names}
    return Quantized(
        graph=quantize(graph, scheme, names, most, divided),
        linears=tuple(names),
        groups=smoothed,
        smoothing_scales={group.name: known[group.name] for group in smoothed},
    )


def quantize(
    graph: Graph, scheme: Scheme, names: Sequence[str], most: Mapping[str, float], divided: Mapping[str, Array]
) -> Graph:
    """``graph`` with the linears ``names`` quantized; it is changed in place and returned with its new weights.

    ``most`` is the largest magnitude of each linear's input, where the scheme quantizes inputs. ``divided`` are factors
    [in] by which the graph divides the input of a linear; ``most`` is what comes after that.
    """
    wanted = frozenset(names)
    weights: dict[str, tuple[Weight, ...]] = {weight.name: (weight,) for weight in graph.weights}
    writer = _Writer(graph)
    for node, x, parameter in list(_products(graph)):
        name = str(parameter.name).removesuffix(".weight")
        if name in divided:
            x = writer.divided(node, name, x, divided[name])
        if name in wanted:
            if scheme.inputs is not None:
                x = writer.rounded(node, name, x, scheme.inputs, most[name])
            made = codes, scales = _stored(weights[str(parameter.name)][0], scheme.weights, graph.dtype)
            weights[codes.name] = made
            node.replace_input_with(1, writer.weight(node, codes, scales))
        node.replace_input_with(0, x)
    return replace(graph, weights=tuple(weight for made in weights.values() for weight in made))


def _round_attention(graph: Graph, calibration: Calibration | None) -> None:
    """Put queries, keys and values through FP8, in place."""
    writer, found = _Writer(graph), list(_attentions(graph))
    if calibration is not None:
        calibration.check_linears([name for _, attention, _ in found for name in operands(attention)])
    for node, attention, values in found:
        for place, (name, value) in enumerate(zip(operands(attention), values, strict=True)):
            most = 1.0 if calibration is None else float(calibration.amax[name].max())
            node.replace_input_with(place, writer.rounded(node, name, value, ATTENTION, most))


def _stored(weight: Weight, quantizer: Quantizer, dtype: DType) -> tuple[Weight, Weight]:
    """The parameters that hold the codes of ``weight`` and their scales.

    Scales of groups are of the dtype in which the graph computes: TensorRT takes no others.
    """
    codes = replace(weight, dtype=quantizer.codes, quantizer=quantizer)
    scales = replace(
        weight,
        name=f"{weight.name}.scale",
        shape=quantizer.scale_shape(weight.shape),
        dtype=dtype if quantizer.per == "group" else "float32",
        quantizer=quantizer,
        scale_of=weight.name,
    )
    return codes, scales


class _Writer:
    """Puts nodes before others; what was written for one linear serves the others with the same input."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.dtype = graph.model.graph, DTYPES[graph.dtype]
        self.done: dict[Any, ir.Value] = {}
        self.count = 0

    def divided(self, node: ir.Node, name: str, x: ir.Value, factors: Array) -> ir.Value:
        key = ("divided", x.name, factors.tobytes())
        if key not in self.done:
            inverse = self.constant(f"{name}.inverse_factors", 1 / factors, self.dtype)
            self.done[key] = self.node(node, "Mul", [x, inverse], self.dtype)
        return self.done[key]

    def rounded(self, node: ir.Node, name: str, x: ir.Value, quantizer: Quantizer, most: float) -> ir.Value:
        """``x`` through its codes and back."""
        scale = quantizer.scale_of(most)
        key = ("rounded", x.name, quantizer, scale.tobytes())
        if key not in self.done:
            constant = self.constant(f"{name}.input_scale", scale, ir.DataType.FLOAT)
            kind = DTYPES[quantizer.codes]
            codes = self.node(node, "QuantizeLinear", [x, constant], kind, {"output_dtype": int(kind)})
            self.done[key] = self.node(
                node, "DequantizeLinear", [codes, constant], self.dtype, {"output_dtype": int(self.dtype)}
            )
        return self.done[key]

    def weight(self, node: ir.Node, codes: Weight, scales: Weight) -> ir.Value:
        """The weight that ``codes`` and ``scales`` stand for."""
        quantizer = codes.quantizer
        assert quantizer is not None
        parameters = []
        for weight in (codes, scales):
            value = ir.Value(name=weight.name, type=ir.TensorType(DTYPES[weight.dtype]), shape=ir.Shape(weight.shape))
            self.graph.initializers[weight.name] = value
            parameters.append(value)
        attributes = {"output_dtype": int(self.dtype)}
        if quantizer.per != "tensor":
            attributes["axis"] = 1 if quantizer.per == "channel" else 0
        if quantizer.per == "group":
            attributes["block_size"] = quantizer.group
        return self.node(node, "DequantizeLinear", parameters, self.dtype, attributes)

    def constant(self, name: str, values: Any, dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(np.asarray(values, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(np.shape(values)), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def node(
        self,
        before: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """The output of a new node of that kind before another, in whose scope it is."""
        self.count += 1
        name = f"{before.name}.{kind}_{self.count}"
        made = ir.node(kind, inputs=inputs, attributes=attributes, num_outputs=1, name=name)
        made.metadata_props.update(before.metadata_props)
        self.graph.insert_before(before, made)
        output = made.outputs[0]
        output.name, output.type, output.shape = f"{name}.output", ir.TensorType(dtype), inputs[0].shape
        return output


def _in_a_block(graph: Graph, name: str) -> bool:
    """Whether a module is one of those that may be quantized."""
    return any(fnmatch(name, pattern) for pattern in QUANTIZABLE.get(graph.component, ()))


def _attentions(graph: Graph) -> Iterator[tuple[ir.Node, str, tuple[ir.Value, ir.Value, ir.Value]]]:
    """The attentions of blocks: node, name of the module, queries, keys and values."""
    for node in graph.model.graph:
        name = str(node.name).rpartition("/")[0].replace("/", ".")
        if node.op_type == "Attention" and _in_a_block(graph, name):
            q, k, v = node.inputs[:3]
            assert q is not None
            assert k is not None
            assert v is not None
            yield node, name, (q, k, v)


def _products(graph: Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """The multiplications by a weight: node, input and weight."""
    known = {weight.name for weight in graph.weights}
    for node in graph.model.graph:
        if node.op_type == "MatMul":
            x, parameter = node.inputs
            assert x is not None
            assert parameter is not None
            if parameter.name in known:
                yield node, x, parameter
