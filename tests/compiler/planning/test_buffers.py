"""The memory that a compiler reserves, counted by hand for small graphs; sizes are multiples of a workspace."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.buffers import WORKSPACE
from qie.compiler.planning.cost import cost
from qie.engines.bundle.manifest import TensorSpec

W = WORKSPACE
ROWS = W // 4
"""Rows of a float32 tensor that is as large as a workspace if it has one column."""


def reserved(body: Callable[..., Sequence[ir.Value]], *columns: int, outputs: int = 1) -> float:
    """Memory of a graph of inputs [ROWS, columns], in workspaces."""
    inputs = [TensorSpec(name=f"x{i}", dtype="float32", dims=("n", width)) for i, width in enumerate(columns)]
    made = [TensorSpec(name=f"y{i}", dtype="float32", dims=("n", f"m{i}")) for i in range(outputs)]
    graph = Graph.trace("vision", "text_encoder", "float32", body, inputs=inputs, outputs=made)
    return cost(graph, {"n": ROWS}, compiled=True).activation_bytes / W


def product(op: Any, x: ir.Value, name: str, rows: int, columns: int) -> ir.Value:
    """``x`` [n, rows] times a weight."""
    return op.MatMul(x, op.initializer(ir.tensor(np.ones((rows, columns), np.float32)), name=name))


def test_pointwise_nodes_write_only_what_a_product_reads() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        y = op.Sigmoid(op.Neg(product(op, x, "a", 2, 3)))
        return [product(op, y, "b", 3, 5)]

    assert reserved(body, 2) == 3 + 3  # the first product, the pointwise kernel; workspaces find room in them


def test_workspaces_get_a_region_of_their_own_where_none_is_free() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        return [op.Sigmoid(product(op, product(op, x, "a", 2, 3), "b", 3, 5))]

    assert reserved(body, 2) == 5 + 3 + 1


def test_a_region_is_as_large_as_the_largest_of_its_tensors() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        for name, rows, columns in (("a", 2, 3), ("b", 3, 7), ("c", 7, 4), ("d", 4, 6)):
            x = product(op, x, name, rows, columns)
        return [op.Sigmoid(x)]

    assert reserved(body, 2) == 7 + 4 + 1  # the output of b, later of d; that of a, later of c; a workspace


def test_products_of_one_tensor_have_one_output() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        return [op.Mul(product(op, x, "a", 2, 5), op.Sigmoid(product(op, x, "b", 2, 5)))]

    assert reserved(body, 2) == 10 + 1


def test_a_residual_is_part_of_the_product_before_it() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        first = product(op, x, "a", 2, 3)
        return [op.Sigmoid(op.Add(first, product(op, op.Sigmoid(first), "b", 3, 3)))]

    assert reserved(body, 2) == 3 + 3 + 3 + 1  # what is added, the operand, the sum


def test_a_choice_is_made_again_where_it_is_read() -> None:
    """Also if it is as large as the product before its reader."""

    def body(op: Any, x: ir.Value, gates: ir.Value) -> list[ir.Value]:
        gate = op.Where(op.Less(gates, op.Neg(gates)), gates, op.Neg(gates))
        return [op.Sigmoid(op.Mul(gate, product(op, op.Sigmoid(product(op, x, "a", 2, 3)), "b", 3, 4)))]

    assert reserved(body, 2, 1) == reserved(body, 2, 4) == 4 + 3 + 1
