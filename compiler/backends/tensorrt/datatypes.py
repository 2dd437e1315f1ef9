"""Checks a graph for data types that its GPU does not support, before the engine is compiled."""

from collections.abc import Iterator

import onnx
from onnx import TensorProto

from qie.compiler.recipe.schema import FP8_CAPABILITY, Recipe, supports_fp8
from qie.engines.errors import RecipeError

__all__ = ["check_datatypes"]

FLOAT8 = frozenset(
    (
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT8E4M3FNUZ,
        TensorProto.FLOAT8E5M2,
        TensorProto.FLOAT8E5M2FNUZ,
    )
)

TYPE_ATTRIBUTES = ("to", "output_dtype", "dtype")
"""Node attributes that hold the element type of an output (Cast, QuantizeLinear, DequantizeLinear, ...)."""


def check_datatypes(model: onnx.ModelProto, component: str, recipe: Recipe) -> None:
    """Check that a graph with FP8 tensors is for a GPU with FP8.

    Raises:
        RecipeError: the recipe's compute capability is below 8.9.
    """
    capability = recipe.compute_capability
    if capability is not None and supports_fp8(capability):
        return
    name = next((name for name, kind in _types(model.graph) if kind in FLOAT8), None)
    if name is not None:
        raise RecipeError(
            f"the graph of {component} computes in FP8 (first in {name}), which needs compute capability "
            f"{FP8_CAPABILITY} or later, and the {recipe.gpu} has {capability or 'none'}; set components.{component}."
            'scheme to "int8-smooth" or "none"'
        )


def _types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """(name, element type) of every tensor, value and node in ``graph`` that has one."""
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name, value.type.tensor_type.elem_type
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES:
                yield node.name or node.op_type, attribute.i
            if attribute.HasField("t"):
                yield node.name or node.op_type, attribute.t.data_type
            for inner in (attribute.g, *attribute.graphs):
                yield from _types(inner)
