"""Runs a component block by block, with one block's weights and the samples' values in memory.

A graph is cut where its blocks begin (``transformer_blocks.7``, ``layers.7``). Every segment is a graph of its own:
onnxruntime executes it for all samples before the weights of the next segment are read.
"""

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
from qie.compiler.graphs.blocks import by_block, read_by
from qie.compiler.graphs.graph import IR_VERSION, OPSET, Graph
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Weight
from qie.engines.progress import Progress

__all__ = ["Readers", "Segment", "Values", "loaded", "read_later", "run", "run_segments", "segments"]

Values = dict[str, NDArray[Any]]
"""Name in the graph -> value, of one sample."""

Readers = Mapping[Subfolder, TensorReader]
"""The tensors of a checkpoint."""

AfterSample = Callable[["Segment", int, Values], None]
"""Called with a segment, the index of a sample, and what the segment read and computed of it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        name: the block, or "beginning".
        nodes: the nodes in order.
        constants: initializers that are no weights.
        weights: parameters that the nodes read.
        reads: values that come from earlier segments or are inputs of the graph.
        makes: values that later segments read or that are outputs of the graph.
        types: element type of every value.
    """

    name: str
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    weights: tuple[Weight, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    types: Mapping[str, int]

    def write(self, folder: Path, readers: Readers, outputs: Sequence[str]) -> Path:
        """Write the segment as a graph with these outputs, and its weights, into ``folder``."""
        written = write_weights(self.weights, readers, folder / "weights")
        stored = []
        for weight in self.weights:
            offset, length = written.places[weight.name]
            tensor = onnx.TensorProto(name=weight.name, data_type=self.types[weight.name], dims=weight.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            stored.append(tensor)
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(name, self.types[name], None) for name in self.reads],
            [helper.make_tensor_value_info(name, self.types[name], None) for name in outputs],
            [*self.constants, *stored],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        path = folder / "segment.onnx"
        path.write_bytes(model.SerializeToString())
        return path


def segments(graph: Graph) -> tuple[Segment, ...]:
    """The segments of ``graph`` in order: the beginning, then one per block; the last includes the end."""
    proto = graph.proto("", None).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.input, *proto.output, *proto.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in proto.initializer}
    weights = {weight.name: weight for weight in graph.weights}
    constants = {tensor.name: tensor for tensor in proto.initializer if tensor.name not in weights}
    groups = by_block(proto.node)
    outputs = [value.name for value in proto.output]
    needed: list[set[str]] = [set(outputs)]
    for _, nodes in reversed(groups):
        needed.append(needed[-1] | {name for node in nodes for name in read_by(node)})
    result = []
    for (name, nodes), later in zip(groups, reversed(needed[:-1]), strict=True):
        computed = {output for node in nodes for output in node.output}
        read = dict.fromkeys(name for node in nodes for name in read_by(node) if name not in computed)
        result.append(
            Segment(
                name=name,
                nodes=tuple(nodes),
                constants=tuple(constants[name] for name in read if name in constants),
                weights=tuple(weights[name] for name in read if name in weights),
                reads=tuple(name for name in read if name not in constants and name not in weights),
                makes=tuple(sorted(computed & later)),
                types=types,
            )
        )
    return tuple(result)


def run(
    graph: Graph,
    readers: Readers,
    samples: Sequence[Values],
    progress: Progress,
    *,
    watch: Mapping[str, Sequence[str]] | None = None,
    after_sample: AfterSample = lambda segment, sample, values: None,
    after_segment: Callable[[Segment], None] = lambda segment: None,
    limit: int | None = None,
) -> None:
    """Run ``samples`` through ``graph``, in place.

    Args:
        graph: the component.
        readers: the checkpoint's tensors.
        samples: inputs of the graph before, its outputs after.
        progress: called after each segment.
        watch: see ``run_segments``.
        after_sample: see ``run_segments``.
        after_segment: called with each segment after the last sample.
        limit: number of segments after which to stop; None for all.
    """
    cut = segments(graph)
    for number, segment in enumerate(
        run_segments(cut, readers, samples, watch=watch, after_sample=after_sample), start=1
    ):
        after_segment(segment)
        progress(graph.component, number, len(cut))
        if number == limit:
            break


def run_segments(
    cut: Sequence[Segment],
    readers: Readers,
    samples: Sequence[Values],
    *,
    watch: Mapping[str, Sequence[str]] | None = None,
    after_sample: AfterSample = lambda segment, sample, values: None,
) -> Iterator[Segment]:
    """Run ``samples`` through the segments ``cut``, in place, and yield each segment after its last sample.

    A sample holds the graph's inputs before and its outputs after; values that nothing reads any more are dropped.

    Args:
        cut: the segments of a graph.
        readers: the checkpoint's tensors.
        samples: the values of each sample.
        watch: weight -> values that ``after_sample`` also gets for the segment of that weight.
        after_sample: called after every run with what the segment read and computed.
    """
    watched = watch or {}
    for number, segment in enumerate(cut):
        later = read_later(cut, number)
        extra = [value for weight in segment.weights for value in watched.get(weight.name, ())]
        with loaded(segment, readers, [name for name in extra if name not in segment.reads]) as compute:
            for sample, values in enumerate(samples):
                computed = compute(values)
                after_sample(segment, sample, values | computed)
                values |= {name: computed[name] for name in segment.makes}
                for name in [name for name in values if name not in later]:
                    del values[name]
                del computed
        yield segment


@contextmanager
def loaded(segment: Segment, readers: Readers, extra: Sequence[str] = ()) -> Iterator[Callable[[Values], Values]]:
    """A function from a sample's values to those that ``segment`` makes of them, and to the values ``extra``."""
    outputs = list(dict.fromkeys((*segment.makes, *extra)))
    with tempfile.TemporaryDirectory(prefix="qie-") as folder:
        session = _session(segment.write(Path(folder), readers, outputs))

        def compute(values: Values) -> Values:
            return dict(zip(outputs, session.run(outputs, {name: values[name] for name in segment.reads}), strict=True))

        yield compute


def read_later(cut: Sequence[Segment], number: int) -> frozenset[str]:
    """Names that segments behind number ``number`` read, and the outputs of the graph."""
    return frozenset(name for segment in cut[number + 1 :] for name in segment.reads) | frozenset(cut[-1].makes)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # execute Q/DQ as written, products in float32
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped, without a second copy
    options.enable_cpu_mem_arena = False  # frees memory between nodes
    available = ort.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    return ort.InferenceSession(str(path), options, providers=providers)
