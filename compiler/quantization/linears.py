"""The linears of a graph that can be quantized, the values that they read, and the ones that a recipe excludes."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import onnx_ir as ir

from qie.compiler.graphs.graph import Graph
from qie.compiler.recipe.quantizable import QUANTIZABLE
from qie.engines.errors import RecipeError

__all__ = [
    "attention_input_names",
    "attention_inputs",
    "attention_nodes",
    "excluded",
    "linear_inputs",
    "linear_nodes",
    "linears",
    "matching",
]


def linears(graph: Graph) -> tuple[str, ...]:
    """The linears of ``graph`` that can be quantized, in graph order.

    A linear is named like its weight in the checkpoint, without ``.weight``.
    """
    return tuple(name for name in linear_inputs(graph) if _is_quantizable(graph, name))


def linear_inputs(graph: Graph) -> dict[str, str]:
    """Name of every linear of ``graph`` in graph order -> name of the value that it reads."""
    return {str(weight.name).removesuffix(".weight"): str(x.name) for _, x, weight in linear_nodes(graph)}


def linear_nodes(graph: Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Every MatMul of ``graph`` by a weight: the node, its input and the weight."""
    weights = {weight.name for weight in graph.weights}
    for node in graph.model.graph:
        if node.op_type == "MatMul":
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            if weight.name in weights:
                yield node, x, weight


def attention_inputs(graph: Graph) -> dict[str, tuple[str, str, str]]:
    """Name of every attention in a quantizable block -> names of the values that are its queries, keys and values."""
    return {name: (str(q.name), str(k.name), str(v.name)) for _, name, (q, k, v) in attention_nodes(graph)}


def attention_nodes(graph: Graph) -> Iterator[tuple[ir.Node, str, tuple[ir.Value, ir.Value, ir.Value]]]:
    """Every attention in a quantizable block: the node, the name of its module, and its queries, keys and values."""
    for node in graph.model.graph:
        name = str(node.name).rpartition("/")[0].replace("/", ".")
        if node.op_type == "Attention" and _is_quantizable(graph, name):
            q, k, v = node.inputs[:3]
            assert q is not None
            assert k is not None
            assert v is not None
            yield node, name, (q, k, v)


def attention_input_names(attention: str) -> tuple[str, str, str]:
    """The names under which a calibration holds the amax of queries, keys and values of ``attention``."""
    return f"{attention}.query", f"{attention}.key", f"{attention}.value"


def excluded(graph: Graph, patterns: Sequence[str]) -> tuple[str, ...]:
    """The quantizable linears of ``graph`` that match one of the fnmatch ``patterns``, in graph order.

    A pattern may count blocks from the end: ``transformer_blocks.-1.*`` is the last block.

    Raises:
        RecipeError: a pattern matches no linear.
    """
    names = linears(graph)
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise RecipeError(
                f'components.{graph.component}.exclude has "{pattern}", which matches no linear of this model; use '
                f'names like "{names[0] if names else "(none)"}"'
            )
    return matching(names, patterns)


def matching(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Those of the linears ``names`` of a component that match one of the fnmatch ``patterns``; see ``excluded``."""
    from_end = _counted_from_end(names)
    return tuple(
        name
        for name in names
        if any(fnmatch(name, pattern) or fnmatch(from_end[name], pattern) for pattern in patterns)
    )


def _counted_from_end(names: Sequence[str]) -> dict[str, str]:
    """Each name -> the name with its block counted from the end: ``blocks.59.to_q`` of 60 -> ``blocks.-1.to_q``."""
    parts = {name: re.split(r"\.(\d+)\.", name, maxsplit=1) for name in names}
    blocks = 1 + max((int(number) for _, number, _ in parts.values()), default=0)
    return {name: f"{before}.{int(number) - blocks}.{after}" for name, (before, number, after) in parts.items()}


def _is_quantizable(graph: Graph, name: str) -> bool:
    pattern = QUANTIZABLE.get(graph.component)
    return pattern is not None and fnmatch(name, pattern)
