"""The cost of one run of a graph, counted from its nodes at concrete sizes; no weight is read.

- Operations: matrix products, convolutions and attention; a multiply-add is two. Everything else is neglected.
- Memory traffic: what those nodes read and write. Everything between them can be fused into one of them.
- Activation memory: intermediate tensors in the order of the nodes, each alive from the node that writes it to the last
  one that reads it, without inputs, outputs and weights. An Attention node is one kernel without a score tensor;
  attention written as MatMul, Softmax, MatMul has a score tensor, which counts.

An engine compiler fuses and reorders, so its own figure differs. tensorrt-rtx 1.7.1, compiling for 8.9 with fixed
shapes in bfloat16, reported 0.7 to 1.4 times this peak for the published VAE (256 x 256 to 1536 x 1536 pixels, batch 1
to 4) and 1.2 to 1.5 times for two blocks of the published transformer (512 x 512 and 1024 x 1024 pixels, one reference,
batch 1 to 4).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qie.compiler.graphs.graph import Graph

__all__ = ["Cost", "Kind", "Work", "cost"]

Kind = Literal["gemm", "convolution", "attention"]

_VIEWS = ("DequantizeLinear", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Nodes that make no tensor: whoever reads their output reads their first input, in the type in which it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Operations of one kind on operands of one dtype.

    Attributes:
        kind: of the operations.
        dtype: of the operands, named as in NumPy (``bfloat16``).
        flops: number of operations.
    """

    kind: Kind
    dtype: str
    flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one run.

    Attributes:
        work: operations by kind and dtype, each pair once.
        moved_bytes: memory traffic of the products.
        activation_bytes: peak size of the intermediate tensors, and of the scores that the largest attention makes.
        io_bytes: size of inputs and outputs.
        scores_bytes: of ``activation_bytes``, what are scores; 0 where attention makes none.
    """

    work: tuple[Work, ...]
    moved_bytes: int
    activation_bytes: int
    io_bytes: int
    scores_bytes: int

    def flops(self, kind: Kind | None = None) -> int:
        """Operations of one kind, or of all."""
        return sum(w.flops for w in self.work if kind in (None, w.kind))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
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


def cost(graph: Graph, sizes: Mapping[str, int], *, scores: bool | None = None) -> Cost:
    """The cost of one run of ``graph``; ``sizes`` gives every free dimension of its inputs.

    ``scores`` says whether attention makes them, as onnxruntime's kernel for CPUs does; None is for a float32 graph.

    Causal and masked attention count as if every query saw every key; a kernel that skips the masked part does less.
    """
    model = _settled(_sized(graph, sizes))
    weights = {t.name for t in model.graph.initializer}
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    tensors = _tensors(model.graph, {})
    flops, moved, peak = _run(model.graph, tensors, weights=weights, held=weights | ends)
    made = graph.dtype == "float32" if scores is None else scores
    largest = max((_scores(node, tensors) for node in model.graph.node), default=0) if made else 0
    return Cost(
        work=tuple(Work(kind=kind, dtype=dtype, flops=count) for (kind, dtype), count in flops.items()),
        moved_bytes=moved,
        activation_bytes=peak + largest,
        io_bytes=sum(tensors[name].bytes for name in ends),
        scores_bytes=largest,
    )


def _scores(node: onnx.NodeProto, tensors: Mapping[str, _Tensor]) -> int:
    """Bytes of an attention's scores, float32 [batch, heads, queries, keys], and of a mask and its sum with them."""
    if node.op_type != "Attention":
        return 0
    attributes = {a.name: a.i for a in node.attribute}
    (batch, queries, _), (_, keys, _) = (tensors[name].shape for name in node.input[:2])
    masked = bool(attributes.get("is_causal")) or (len(node.input) > 3 and bool(node.input[3]))
    return 4 * batch * queries * keys * (attributes["q_num_heads"] + 2 * masked)


def _run(
    graph: onnx.GraphProto, tensors: Mapping[str, _Tensor], *, weights: Collection[str], held: Collection[str]
) -> tuple[dict[tuple[Kind, str], int], int, int]:
    """Operations, bytes moved and the most bytes of tensors alive in one run; tensors in ``held`` are the caller's.

    What a loop's body holds comes to what is alive around the loop; its operations are done once per turn.
    """
    flops: dict[tuple[Kind, str], int] = defaultdict(int)
    moved = 0
    inside = [0] * len(graph.node)
    for place, node in enumerate(graph.node):
        if node.op_type == "Loop":
            body, times = _body(node), tensors[node.output[0]].shape[0]
            within = {**tensors, **_tensors(body, tensors)}
            outer = {value.name for value in (*body.input, *body.output)} | tensors.keys()
            counts, bytes_per_turn, inside[place] = _run(body, within, weights=weights, held=outer)
            for what, count in counts.items():
                flops[what] += times * count
            moved += times * bytes_per_turn
        counted = _operations(node, tensors, weights)
        if counted is not None:
            kind, operations = counted
            flops[kind, tensors[node.input[0]].dtype.numpy().name] += operations
            moved += sum(tensors[name].bytes for name in (*node.input, *node.output) if name)
    alive = _alive(graph.node, tensors, held=held)
    return flops, moved, max(map(add, alive, inside))


def _operations(
    node: onnx.NodeProto, tensors: Mapping[str, _Tensor], weights: Collection[str]
) -> tuple[Kind, int] | None:
    """Kind and number of a node's operations; None for a node that is neglected.

    A product of two activations is half an attention.
    """
    attributes = {a.name: a.i for a in node.attribute}
    shapes = [tensors[name].shape if name else () for name in node.input]
    results = math.prod(tensors[node.output[0]].shape)
    match node.op_type:
        case "MatMul" | "Gemm":
            depth = shapes[0][-2] if attributes.get("transA") else shapes[0][-1]
            weighted = any(tensors[name].storage in weights for name in node.input[:2])
            return "gemm" if weighted else "attention", 2 * depth * results
        case "Conv":
            return "convolution", 2 * results * math.prod(shapes[1][1:])
        case "Attention":
            (batch, queries, width), (_, keys, _), (_, _, value_width) = shapes[:3]
            groups = attributes["q_num_heads"] // attributes["kv_num_heads"]
            return "attention", 2 * batch * queries * keys * (width + groups * value_width)
    return None


def _alive(nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, _Tensor], *, held: Collection[str]) -> list[int]:
    """The bytes of tensors alive at every node, but for those in ``held``."""
    born: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for name in (tensors[name].storage for name in _touched(node) if name in tensors):
            born.setdefault(name, place)
            last[name] = place
    change = [0] * (len(nodes) + 1)
    for name in born.keys() - held:
        change[born[name]] += tensors[name].bytes
        change[last[name] + 1] -= tensors[name].bytes
    return list(accumulate(change[:-1]))


def _touched(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads and makes, and those around it that its body reads."""
    yield from filter(None, (*node.input, *node.output))
    if node.op_type == "Loop":
        for inner in _body(node).node:
            yield from filter(None, inner.input)


def _body(loop: onnx.NodeProto) -> onnx.GraphProto:
    (body,) = (a.g for a in loop.attribute if a.name == "body")
    return body


def _tensors(graph: onnx.GraphProto, around: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """Every tensor of a graph whose shapes are all known; a loop's body views tensors ``around`` it."""
    tensors = {
        name: _Tensor(shape=shape, dtype=dtype, storage=name) for name, (shape, dtype) in _known_types(graph).items()
    }
    for node in graph.node:
        if node.op_type in _VIEWS:
            source = tensors.get(node.input[0]) or around[node.input[0]]
            view = tensors[node.output[0]]
            tensors[node.output[0]] = _Tensor(shape=view.shape, dtype=source.dtype, storage=source.storage)
    return tensors


# Concrete shapes


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
            body = _body(node)
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
