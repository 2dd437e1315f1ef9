"""The layers that the graphs share, each written for one compute dtype.

Shape suffixes: B batch, S sequence, D width, H heads, K head width, E half a head width.
Norms accumulate in float32 (ONNX stash type), as the reference does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from qie.compiler.graphs.graph import DTYPES, Parameter, constant
from qie.compiler.weights.weight import DType, Layout

__all__ = [
    "INT64_MAX",
    "HeadNorm",
    "Linear",
    "RMSNorm",
    "attention",
    "cast",
    "loop",
    "norm_and_rotate",
    "rotate",
    "silu",
    "split",
]

INT64_MAX = 2**63 - 1
"""The ``ends`` of a Slice that runs to the end of its axis."""


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


class HeadNorm(nn.Module):
    """The weight [K] of an RMSNorm over the width of a head, which ``norm_and_rotate`` applies."""

    def __init__(self, width: int, *, dtype: DType) -> None:
        super().__init__()
        self.weight = Parameter([width], dtype)

    def forward(self, op: Any) -> ir.Value:
        return self.weight


def norm_and_rotate(
    op: Any,
    x_BSD: ir.Value,
    weight: ir.Value,
    cos_SE: ir.Value,
    sin_SE: ir.Value,
    *,
    heads: int,
    width: int,
    dtype: DType,
    eps: float,
) -> ir.Value:
    """RMSNorm over each head, then rotary embedding of adjacent pairs, both in float32; ``weight`` is [K] or [S, 1, K].

    With RMSNormalization and RotaryEmbedding, TensorRT writes and reads x once more, and with a cast of x in front of
    the split into pairs it stores x in float32 (docs/tensorrt.md).
    """
    x_BSHK = op.Reshape(x_BSD, [0, 0, heads, -1])
    squares_BSHK = op.Pow(cast(op, x_BSHK, dtype, "float32"), constant(op, 2.0))
    mean_BSH1 = op.ReduceMean(squares_BSHK, [-1], keepdims=1)
    inverse_BSH1 = op.Reciprocal(op.Sqrt(op.Add(mean_BSH1, constant(op, eps))))

    def normalized(first: int) -> ir.Value:
        """Every second channel of a head, [B, S, H, E]."""
        x_BSHE, weight_E = (op.Slice(value, [first], [INT64_MAX], [-1], [2]) for value in (x_BSHK, weight))
        x_BSHE = op.Mul(cast(op, x_BSHE, dtype, "float32"), inverse_BSH1)
        return op.Mul(x_BSHE, cast(op, weight_E, dtype, "float32"))

    real_BSHE, imaginary_BSHE = normalized(0), normalized(1)
    cos_S1E, sin_S1E = op.Unsqueeze(cos_SE, [1]), op.Unsqueeze(sin_SE, [1])
    rotated = (
        op.Sub(op.Mul(real_BSHE, cos_S1E), op.Mul(imaginary_BSHE, sin_S1E)),
        op.Add(op.Mul(real_BSHE, sin_S1E), op.Mul(imaginary_BSHE, cos_S1E)),
    )
    pairs_BSHE2 = op.Concat(*(op.Unsqueeze(half, [-1]) for half in rotated), axis=-1)
    return cast(op, op.Reshape(pairs_BSHE2, [0, 0, width]), "float32", dtype)


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
