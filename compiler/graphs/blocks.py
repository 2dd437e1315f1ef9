"""The nodes of a graph by block: where a graph is cut to run, or to be compiled, piece by piece."""

import re
from collections.abc import Iterable, Iterator

import onnx

__all__ = ["BEGINNING", "by_block", "read_by"]

BLOCK = re.compile(r"(?:^|/)((?:transformer_blocks|layers|blocks)\.\d+)(?:/|$)")
"""The block in the scopes of a node's name."""

BEGINNING = "beginning"
"""What is before the first block."""


def by_block(nodes: Iterable[onnx.NodeProto]) -> list[tuple[str, list[onnx.NodeProto]]]:
    """The nodes before the first block, then those of each block with its name; the last block's include the end."""
    groups: list[tuple[str, list[onnx.NodeProto]]] = [(BEGINNING, [])]
    for node in nodes:
        match = BLOCK.search(node.name)
        if match and match[1] != groups[-1][0]:
            groups.append((match[1], []))
        groups[-1][1].append(node)
    return groups


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Every name that a node reads, its subgraphs included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            own = {output for n in inner.node for output in n.output} | {value.name for value in inner.input}
            own |= {tensor.name for tensor in inner.initializer}
            yield from (name for n in inner.node for name in read_by(n) if name not in own)
