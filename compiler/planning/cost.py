"""The cost of one run of a graph, counted from its nodes at concrete sizes; no weight is read.

- Operations: matrix products, convolutions and attention; a multiply-add is two. Everything else is neglected.
- Memory traffic: what those nodes read and write. Everything between them can be fused into one of them.
- Activation memory: intermediate tensors in the order of the nodes, each alive from the node that writes it to the last
  one that reads it, without inputs, outputs and weights. An Attention node is one kernel without a score tensor;
  attention written as MatMul, Softmax, MatMul has a score tensor, which counts. What an engine compiler reserves is
  counted otherwise (``qie.compiler.planning.buffers``), because it fuses nodes and does not know the sizes.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import add
from typing import Literal

import onnx

from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.buffers import reserved_bytes
from qie.compiler.planning.shapes import Tensor, at_sizes, body_of, tensors_of

__all__ = ["Cost", "Kind", "Work", "cost"]

Kind = Literal["gemm", "convolution", "attention"]


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
        activation_bytes: peak size of the intermediate tensors, and of the scores that the largest attention makes;
            what the compiler reserves, where the graph is compiled.
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


def cost(graph: Graph, sizes: Mapping[str, int], *, scores: bool | None = None, compiled: bool = False) -> Cost:
    """The cost of one run of ``graph``; ``sizes`` gives every free dimension of its inputs.

    ``scores`` says whether attention makes them, as onnxruntime's kernel for CPUs does; None is for a float32 graph.
    ``compiled`` says that an engine compiler decides about memory, for an engine with these sizes at most; its
    attention makes no scores.

    Causal and masked attention count as if every query saw every key; a kernel that skips the masked part does less.
    """
    model = at_sizes(graph, sizes)
    weights = {t.name for t in model.graph.initializer}
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    tensors = tensors_of(model.graph, {})
    flops, moved, peak = _run(model.graph, tensors, weights=weights, held=weights | ends)
    made = graph.dtype == "float32" if scores is None else scores
    made = made and not compiled
    largest = max((_scores(node, tensors) for node in model.graph.node), default=0) if made else 0
    peak = reserved_bytes(model.graph) if compiled else peak
    return Cost(
        work=tuple(Work(kind=kind, dtype=dtype, flops=count) for (kind, dtype), count in flops.items()),
        moved_bytes=moved,
        activation_bytes=peak + largest,
        io_bytes=sum(tensors[name].bytes for name in ends),
        scores_bytes=largest,
    )


def _scores(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an attention's scores, float32 [batch, heads, queries, keys], and of a mask and its sum with them."""
    if node.op_type != "Attention":
        return 0
    attributes = {a.name: a.i for a in node.attribute}
    (batch, queries, _), (_, keys, _) = (tensors[name].shape for name in node.input[:2])
    masked = bool(attributes.get("is_causal")) or (len(node.input) > 3 and bool(node.input[3]))
    return 4 * batch * queries * keys * (attributes["q_num_heads"] + 2 * masked)


def _run(
    graph: onnx.GraphProto, tensors: Mapping[str, Tensor], *, weights: Collection[str], held: Collection[str]
) -> tuple[dict[tuple[Kind, str], int], int, int]:
    """Operations, bytes moved and the most bytes of tensors alive in one run; tensors in ``held`` are the caller's.

    What a loop's body holds comes to what is alive around the loop; its operations are done once per turn.
    """
    flops: dict[tuple[Kind, str], int] = defaultdict(int)
    moved = 0
    inside = [0] * len(graph.node)
    for place, node in enumerate(graph.node):
        if node.op_type == "Loop":
            body, times = body_of(node), tensors[node.output[0]].shape[0]
            within = {**tensors, **tensors_of(body, tensors)}
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
    node: onnx.NodeProto, tensors: Mapping[str, Tensor], weights: Collection[str]
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


def _alive(nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, Tensor], *, held: Collection[str]) -> list[int]:
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
        for inner in body_of(node).node:
            yield from filter(None, inner.input)
