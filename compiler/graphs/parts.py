"""Parts: a component as several consecutive graphs of whole blocks, for an engine each.

A part computes what the whole graph computes in its blocks, with the same nodes. What depends on weights crosses from
one part to the next, as an output of the one and an input of the other: the hidden states. What depends only on inputs
of the graph, such as masks, rotary embeddings and the rows of the modulation, is computed in every part that reads it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import onnx
import onnx_ir as ir

from qie.compiler.graphs.blocks import by_block, read_by
from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.manifest import Component, TensorSpec

__all__ = ["HIDDEN", "balanced", "block_bytes", "split"]

HIDDEN: dict[Component, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "transformer": (
        ("image_hidden", ("batch", "latent_tokens")),
        ("text_hidden", ("batch", "text_tokens")),
    ),
    "language": (("hidden", ("batch", "prompt_tokens")),),
}
"""Component that can be divided -> name and free dims of its hidden states behind a block, in the order of the graph.
Their last dim is the width. ``latent_tokens`` are the noise tokens and the reference tokens."""


def block_bytes(graph: Graph) -> tuple[int, ...]:
    """Bytes of the weights of each block of ``graph``; the first has the beginning, the last the end."""
    weights = {weight.name: weight for weight in graph.weights}
    groups = [nodes for _, nodes in by_block(graph.proto("", None).graph.node)]
    blocks = [[*groups[0], *groups[1]], *groups[2:]] if len(groups) > 1 else groups
    return tuple(
        total_bytes([weights[name] for name in dict.fromkeys(_read_by(nodes)) if name in weights]) for nodes in blocks
    )


def balanced(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """How many of ``sizes`` each of ``count`` parts takes, all in order, so that the largest part is smallest."""
    assert 1 <= count <= len(sizes), f"{count} parts of {len(sizes)} blocks"
    ends = [0, *accumulate(sizes)]
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {0: ((0, 0), ())}  # end -> (largest, squares), parts
    for number in range(1, count + 1):
        last = [len(sizes)] if number == count else range(number, len(sizes) - count + number + 1)
        best = {
            end: min(
                ((max(cost[0], size), cost[1] + size**2), (*parts, end - start))
                for start, (cost, parts) in best.items()
                if start < end
                for size in [ends[end] - ends[start]]
            )
            for end in last
        }
    return best[len(sizes)][1]


def split(graph: Graph, count: int) -> tuple[Graph, ...]:
    """``graph`` as ``count`` consecutive graphs of whole blocks, with about equal bytes of weights.

    Inputs that a part does not read are none of its inputs. ``graph`` stays as it is, and is the only part of one.

    Args:
        graph: of a component in ``HIDDEN``, quantized or not.
        count: from 1 to the number of blocks.
    """
    if count == 1:
        return (graph,)
    sizes = block_bytes(graph)
    source = _Source(graph)
    blocks = [0, *accumulate(balanced(sizes, count))]
    hidden = [source.hidden(blocks=end, number=number) for number, end in enumerate(blocks[1:-1], 1)]
    outputs = {spec.name: spec for spec in graph.outputs}
    ways: list[Mapping[str, TensorSpec]] = [{}, *hidden, outputs]
    return tuple(source.part(reads, makes) for reads, makes in pairwise(ways))


def _read_by(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    return (name for node in nodes for name in read_by(node))


class _Source:
    """A graph that parts are taken from."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.model = graph, graph.proto("", None)
        self.nodes = list(self.model.graph.node)
        self.makers = {name: number for number, node in enumerate(self.nodes) for name in node.output}
        self.weighted = {weight.name for weight in graph.weights}  # names of what depends on weights
        for node in self.nodes:
            if not self.weighted.isdisjoint(read_by(node)):
                self.weighted.update(node.output)

    def hidden(self, *, blocks: int, number: int) -> dict[str, TensorSpec]:
        """What crosses from the first ``blocks`` blocks to the others: name in the graph -> spec of cut ``number``."""
        groups = [nodes for _, nodes in by_block(self.nodes)]
        before = [node for nodes in groups[: blocks + 1] for node in nodes]
        later = {name for nodes in groups[blocks + 1 :] for name in _read_by(nodes)}
        crossing = [name for node in before for name in node.output if name in later and name in self.weighted]
        known = {value.name: value for value in self.model.graph.value_info}
        expected = HIDDEN[self.graph.component]
        assert len(crossing) == len(expected), f"{self.graph.component}: {', '.join(crossing)} cross"
        specs = {}
        for name, (title, dims) in zip(crossing, expected, strict=True):
            kind = known[name].type.tensor_type
            assert kind.elem_type == DTYPES[self.graph.dtype], f"{name} is not {self.graph.dtype}"
            width = kind.shape.dim[-1].dim_value
            specs[name] = TensorSpec(name=f"{title}_{number}", dtype=self.graph.dtype, dims=(*dims, width))
        return specs

    def part(self, reads: Mapping[str, TensorSpec], makes: Mapping[str, TensorSpec]) -> Graph:
        """The graph of all nodes that lead from ``reads`` and inputs of the graph to ``makes``."""
        numbers, names, remaining = set(), set(), list(makes)
        while remaining:
            name = remaining.pop()
            if name in reads or name in names:
                continue
            names.add(name)
            if (number := self.makers.get(name)) is not None and number not in numbers:
                numbers.add(number)
                remaining += read_by(self.nodes[number])
        inputs = (*(spec for spec in self.graph.inputs if spec.name in names), *reads.values())
        outputs = tuple(makes.values())
        renamed = {name: spec.name for name, spec in (*reads.items(), *makes.items())}
        model = onnx.ModelProto(ir_version=self.model.ir_version, producer_name=self.model.producer_name)
        model.opset_import.extend(self.model.opset_import)
        model.graph.name = self.model.graph.name
        model.graph.input.extend(map(_described, inputs))
        model.graph.output.extend(map(_described, outputs))
        model.graph.initializer.extend(t for t in self.model.graph.initializer if t.name in names)
        model.graph.value_info.extend(
            v for v in self.model.graph.value_info if v.name in names and v.name not in renamed
        )
        model.graph.node.extend(self.nodes[number] for number in sorted(numbers))
        for node in model.graph.node:
            for ends in (node.input, node.output):
                ends[:] = [renamed.get(name, name) for name in ends]
        opened = ir.serde.deserialize_model(model)
        weights = tuple(weight for weight in self.graph.weights if weight.name in names)
        for weight in weights:
            opened.graph.initializers[weight.name].const_value = None
        return replace(self.graph, model=opened, inputs=inputs, outputs=outputs, weights=weights)


def _described(spec: TensorSpec) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], spec.dims)
