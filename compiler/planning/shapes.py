"""A graph with concrete sizes: the shape and the dtype of every tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qie.compiler.graphs.graph import Graph

__all__ = ["VIEWS", "Tensor", "at_sizes", "body_of", "tensors_of"]

VIEWS = ("DequantizeLinear", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Nodes that make no tensor: whoever reads their output reads their first input, in the type in which it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor of the graph.

    Attributes:
        shape: its dims.
        dtype: in which it is stored.
        storage: name of the tensor whose memory this one uses, its own unless it is a view.
    """

    shape: tuple[int, ...]
    dtype: ir.DataType
    storage: str

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.shape) * self.dtype.bitwidth / 8)


def body_of(loop: onnx.NodeProto) -> onnx.GraphProto:
    """The graph that a Loop runs every turn."""
    (body,) = (a.g for a in loop.attribute if a.name == "body")
    return body


def tensors_of(graph: onnx.GraphProto, around: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a graph whose shapes are all known; a loop's body views tensors ``around`` it."""
    tensors = {
        name: Tensor(shape=shape, dtype=dtype, storage=name) for name, (shape, dtype) in _known_types(graph).items()
    }
    for node in graph.node:
        if node.op_type in VIEWS:
            source = tensors.get(node.input[0]) or around[node.input[0]]
            view = tensors[node.output[0]]
            tensors[node.output[0]] = Tensor(shape=view.shape, dtype=source.dtype, storage=source.storage)
    return tensors


def at_sizes(graph: Graph, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """``graph`` with ``sizes`` for the free dimensions of its inputs, and the shape of every tensor."""
    return _settled(_sized(graph, sizes))


def _sized(graph: Graph, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The graph with ``sizes`` in the place of its inputs' free dimensions, its outputs' shapes removed."""
    model = graph.proto("", None)
    for value, spec in zip(model.graph.input, graph.inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape(sizes), strict=True):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def _settled(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the shape of every tensor.

    ONNX's shape inference does not look into tensors that are computed from shapes, so these become constants, nor at
    how often a loop turns, so this is told; and it starts again.
    """
    while True:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        types = _known_types(model.graph)
        unknown = [node for node in model.graph.node if any(name and name not in types for name in node.output)]
        if not unknown:
            return model
        folded, stacked = _fold_shapes(model, types), _stacked(model, unknown)
        assert folded or stacked, f"no shape for {', '.join(sorted({n.op_type for n in unknown}))}"
        del model.graph.value_info[:]
        model.graph.value_info.extend(stacked)


def _stacked(model: onnx.ModelProto, unknown: Sequence[onnx.NodeProto]) -> list[onnx.ValueInfoProto]:
    """What loops give back (``qie.compiler.graphs.layers.loop``), as far as turns and results are known."""
    values = {t.name: t for t in model.graph.initializer}
    loops = []
    for node in unknown:
        if node.op_type == "Loop" and node.input[0] in values:
            body = body_of(node)
            result = _known_types(body).get(body.output[-1].name)
            if result is not None:
                shape = [int(numpy_helper.to_array(values[node.input[0]])), *result[0]]
                loops.append(helper.make_tensor_value_info(node.output[0], int(result[1]), shape))
    return loops


def _known_types(graph: onnx.GraphProto) -> dict[str, tuple[tuple[int, ...], ir.DataType]]:
    """Shape and dtype of every tensor whose dimensions are all numbers."""
    types = {t.name: (tuple(t.dims), ir.DataType(t.data_type)) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            types[value.name] = tuple(dim.dim_value for dim in kind.shape.dim), ir.DataType(kind.elem_type)
    return types


def _fold_shapes(model: onnx.ModelProto, types: Mapping[str, tuple[tuple[int, ...], ir.DataType]]) -> bool:
    """Turn the nodes that only shapes and constants decide into constants; False where there are none."""
    graph = model.graph
    values: dict[str, NDArray[Any]] = {
        t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL
    }
    remaining = []
    for node in graph.node:
        inputs = {name: values[name] for name in node.input if name in values}
        if node.op_type == "Shape" and node.input[0] in types:
            inputs = {node.input[0]: np.broadcast_to(np.False_, types[node.input[0]][0])}
        if node.op_type == "Loop" or len(inputs) < len(set(filter(None, node.input))):
            remaining.append(node)
            continue
        for name, value in zip(node.output, _evaluate(model, node, inputs), strict=True):
            values[name] = value
            graph.initializer.append(numpy_helper.from_array(value, name))
    folded = len(remaining) < len(graph.node)
    del graph.node[:]
    graph.node.extend(remaining)
    return folded


def _evaluate(model: onnx.ModelProto, node: onnx.NodeProto, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs of one node of ``model``."""
    ends = [[helper.make_empty_tensor_value_info(name) for name in names] for names in (inputs, node.output)]
    graph = helper.make_graph([node], "node", inputs=ends[0], outputs=ends[1])
    alone = helper.make_model(graph, opset_imports=model.opset_import)
    return [np.asarray(value) for value in ReferenceEvaluator(alone).run(None, dict(inputs))]
