"""Runs a component block by block: the weights of one block and the samples' values are all that is in memory.

A graph is cut where its blocks begin (``transformer_blocks.7``, ``layers.7``). Every piece is a graph of its own that
onnxruntime executes, for all samples one after another, before the weights of the next one are read.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.graphs.graph import IR_VERSION, OPSET, Graph
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Weight

__all__ = ["Segment", "Values", "loaded", "read_later", "run_segments", "segments"]

BLOCK = re.compile(r"(?:^|/)((?:transformer_blocks|layers|blocks)\.\d+)(?:/|$)")
"""Of the scopes of a node, the block that it is in."""

Values = dict[str, NDArray[Any]]
"""Name in the graph -> value, of one sample."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes of a graph: ``reads`` are the values that come from before, ``makes`` those that are read
    later or are outputs of the graph."""

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    weights: tuple[Weight, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    types: Mapping[str, int]

    def write(self, folder: Path, readers: Mapping[Subfolder, TensorReader], also: Sequence[str]) -> Path:
        """The segment as a graph with its weights in ``folder``; values ``also`` are outputs too."""
        written = write_weights(self.weights, readers, folder / "weights")
        stored = []
        for weight in self.weights:
            offset, length = written.places[weight.name]
            tensor = onnx.TensorProto(name=weight.name, data_type=self.types[weight.name], dims=weight.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            stored.append(tensor)
        made = dict.fromkeys((*self.makes, *also))
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(name, self.types[name], None) for name in self.reads],
            [helper.make_tensor_value_info(name, self.types[name], None) for name in made],
            [*self.constants, *stored],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        path = folder / "segment.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def segments(graph: Graph) -> tuple[Segment, ...]:
    """The pieces of ``graph`` in order: what is before the first block, then a block each; the end is with the last."""
    proto = graph.proto("", None).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.input, *proto.output, *proto.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in proto.initializer}
    weights = {weight.name: weight for weight in graph.weights}
    constants = {tensor.name: tensor for tensor in proto.initializer if tensor.name not in weights}
    pieces: list[tuple[str, list[onnx.NodeProto]]] = [("beginning", [])]
    for node in proto.node:
        found = BLOCK.search(node.name)
        if found and found[1] != pieces[-1][0]:
            pieces.append((found[1], []))
        pieces[-1][1].append(node)
    outputs = [value.name for value in proto.output]
    needed: list[set[str]] = [set(outputs)]
    for _, nodes in reversed(pieces):
        needed.append(needed[-1] | {name for node in nodes for name in _read(node)})
    made = []
    for (name, nodes), later in zip(pieces, reversed(needed[:-1]), strict=True):
        own = {output for node in nodes for output in node.output}
        read = dict.fromkeys(name for node in nodes for name in _read(node) if name not in own)
        made.append(
            Segment(
                name=name,
                nodes=tuple(nodes),
                constants=tuple(constants[name] for name in read if name in constants),
                weights=tuple(weights[name] for name in read if name in weights),
                reads=tuple(name for name in read if name not in constants and name not in weights),
                makes=tuple(sorted(own & later)),
                types=types,
            )
        )
    return tuple(made)


def run_segments(
    pieces: Sequence[Segment],
    readers: Mapping[Subfolder, TensorReader],
    samples: Sequence[Values],
    *,
    watch: Mapping[str, Sequence[str]] | None = None,
    observer: Callable[[Segment, int, Values], None] = lambda segment, sample, values: None,
) -> Iterator[Segment]:
    """Run ``samples``, in place, through all ``pieces``; yields each piece when all samples are behind it.

    A sample holds the graph's inputs before and its outputs after; values that nothing reads any more are dropped.
    ``observer`` is called with (piece, number of the sample, values) after every run, the values being what the piece
    read and made; where it has a weight that ``watch`` names, also the values there.
    """
    watched = watch or {}
    for number, piece in enumerate(pieces):
        later = read_later(pieces, number)
        seen = [value for weight in piece.weights for value in watched.get(weight.name, ())]
        with loaded(piece, readers, [name for name in seen if name not in piece.reads]) as compute:
            for sample, values in enumerate(samples):
                found = compute(values)
                observer(piece, sample, values | found)
                values |= {name: found[name] for name in piece.makes}
                for name in [name for name in values if name not in later]:
                    del values[name]
                del found
        yield piece


@contextmanager
def loaded(
    piece: Segment, readers: Mapping[Subfolder, TensorReader], also: Sequence[str] = ()
) -> Iterator[Callable[[Values], Values]]:
    """A function from values of a sample to those that ``piece`` makes of them, and to the values ``also``."""
    wanted = list(dict.fromkeys((*piece.makes, *also)))
    with tempfile.TemporaryDirectory(prefix="qie-") as folder:
        session = _session(piece.write(Path(folder), readers, wanted))

        def compute(values: Values) -> Values:
            made = session.run(wanted, {name: values[name] for name in piece.reads})
            return dict(zip(wanted, made, strict=True))

        yield compute


def read_later(pieces: Sequence[Segment], number: int) -> frozenset[str]:
    """What is read behind the piece of that number, and the outputs of the graph."""
    return frozenset(name for after in pieces[number + 1 :] for name in after.reads) | frozenset(pieces[-1].makes)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Everything that a node reads, by its graphs too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            own = {output for n in inner.node for output in n.output} | {value.name for value in inner.input}
            own |= {tensor.name for tensor in inner.initializer}
            yield from (name for n in inner.node for name in _read(n) if name not in own)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # Q/DQ as they stand, products in float32
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped: no second copy
    options.enable_cpu_mem_arena = False  # memory goes back between the nodes
    available = ort.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    return ort.InferenceSession(str(path), options, providers=providers)
