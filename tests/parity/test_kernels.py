"""Every node of the bfloat16 graphs has a kernel in onnxruntime's CUDA provider."""

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.graphs.components import GRAPHS

BFLOAT16 = frozenset(
    (
        "Add", "Attention", "Cast", "Concat", "Conv", "Div", "Expand", "Gather", "Gelu", "LayerNormalization", "Loop",
        "MatMul", "Mul", "RMSNormalization", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze",
        "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
"""Operators of opset 23 with a bfloat16 kernel for CUDA, of those that a graph could use (onnxruntime,
docs/OperatorKernels.md). DepthToSpace, Pad, QuantizeLinear, ReduceL2 and Resize have none."""


def operators(graph: ir.Graph) -> Iterator[str]:
    """Yield the operator of every node that reads or writes a bfloat16 tensor, or one whose dtype is not known."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from operators(attribute.as_graph())
        dtypes = [value.dtype for value in (*node.inputs, *node.outputs) if value is not None]
        if ir.DataType.BFLOAT16 in dtypes or None in dtypes:
            yield node.op_type


@pytest.mark.parametrize("component", GRAPHS)
def test_onnxruntime_has_every_kernel(checkpoint: Path, component: str) -> None:
    graph = GRAPHS[component](open_checkpoint(checkpoint).model, "bfloat16")
    used = set(operators(graph.model.graph))
    assert "MatMul" in used
    assert used <= BFLOAT16
