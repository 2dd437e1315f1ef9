"""The layers that the graphs share, each written for one compute dtype.

Shape suffixes: B batch, S sequence, D width, H heads, K head width, E half a head width.
Norms accumulate in float32 (ONNX stash type), as the reference does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from qie.compiler.graphs.graph import DTYPES, Parameter
from qie.compiler.weights.weight import DType, Layout

__all__ = ["Linear", "RMSNorm", "attention", "cast", "loop", "rotate", "silu", "split"]


class Linear(nn.Module):
    """``x @ weight (+ bias)`` over the last axis, with the checkpoint's [out, in] transposed to [in, out].

    ``name`` is the module's name in the checkpoint where it is no Python attribute, such as ``to_out.0``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: DType,
        bias: bool = True,
        layout: tuple[Layout, ...] = ("transpose",),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.weight = Parameter([inputs, outputs], dtype, layout)
        self.bias = Parameter([outputs], dtype) if bias else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        y = op.MatMul(x, self.weight)
        return op.Add(y, self.bias) if self.bias is not None else y


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis."""

    def __init__(self, width: int, *, dtype: DType, eps: float) -> None:
        super().__init__()
        self.weight = Parameter([width], dtype)
        self.eps = eps

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps)


def attention(
    op: Any,
    q_BSD: ir.Value,
    k_BSD: ir.Value,
    v_BSD: ir.Value,
    *,
    heads: int,
    kv_heads: int | None = None,
    mask: ir.Value | None = None,
    causal: bool = False,
) -> ir.Value:
    """Scaled dot-product attention, scale 1/sqrt(K), on tensors with the heads folded into the last axis.

    ``mask`` is bool, true where a query attends to a key, and broadcastable to [B, H, S, S].
    """
    return op.Attention(
        q_BSD, k_BSD, v_BSD, mask, q_num_heads=heads, kv_num_heads=kv_heads or heads, is_causal=int(causal)
    )


def rotate(
    op: Any, x_BSD: ir.Value, cos_BSE: ir.Value, sin_BSE: ir.Value, *, heads: int, dtype: DType, interleaved: bool
) -> ir.Value:
    """Rotary embedding in float32, as in the reference; pairs are adjacent if ``interleaved``, otherwise half a head
    apart."""
    x = cast(op, x_BSD, dtype, "float32")
    y = op.RotaryEmbedding(x, cos_BSE, sin_BSE, num_heads=heads, interleaved=int(interleaved))
    return cast(op, y, "float32", dtype)


def cast(op: Any, x: ir.Value, old: str, new: str) -> ir.Value:
    """``x`` cast from dtype ``old`` to ``new``; ``x`` itself where they are equal."""
    return x if old == new else op.Cast(x, to=DTYPES[new])


def loop(op: Any, times: ir.Value, body: Callable[[Any, ir.Value], ir.Value], dtype: DType) -> ir.Value:
    """The results of ``body(op, i)`` for i in 0 .. ``times`` - 1, in sequence, stacked on a new first axis.

    ``times`` is int64 [1]. TensorRT requires the loop condition as a tensor, even where it is always true, and does not
    support Scan.
    """
    index = ir.Value(name="index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    condition = ir.Value(name="going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    outputs = [
        ir.Value(name="still_going", type=condition.type, shape=ir.Shape([])),
        ir.Value(name="", type=ir.TensorType(DTYPES[dtype])),
    ]
    graph = op.builder.subgraph(
        lambda op, index, condition: [op.Identity(condition), body(op, index)],
        [index, condition],
        outputs,
        name="body",
    )
    true = op.initializer(ir.tensor(True), name="always")
    return op.Loop(op.Squeeze(times), true, body=graph)


def silu(op: Any, x: ir.Value) -> ir.Value:
    """SiLU: x * sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def split(op: Any, x: ir.Value, parts: int, *, axis: int) -> Sequence[ir.Value]:
    """``parts`` equal slices of ``x`` along ``axis``."""
    return op.Split(x, num_outputs=parts, axis=axis, _outputs=parts)
