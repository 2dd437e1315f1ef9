"""Runs a component block by block, with one block's weights and the samples' values in memory.

A graph is cut where its blocks begin (``transformer_blocks.7``, ``layers.7``). Every segment is a graph of its own:
onnxruntime executes it for all samples before the weights of the next segment are read.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qie.compiler.graphs.blocks import by_block, read_by
from qie.compiler.graphs.graph import IR_VERSION, OPSET, Graph
from qie.compiler.quantization.block_weights import BlockWeights, Readers, read_weights
from qie.compiler.weights.prepare import check_weights
from qie.compiler.weights.weight import Weight
from qie.engines.bundle.manifest import Component
from qie.engines.errors import CalibrationError, first_line
from qie.engines.machine import release_memory
from qie.engines.progress import Progress

__all__ = [
    "COPIED",
    "Preparation",
    "Segment",
    "Values",
    "loaded",
    "providers",
    "read_later",
    "run",
    "run_segments",
    "segments",
]

COPIED = 256_000_000
"""Bytes of float32 weights up to which a segment has them as initializers: onnxruntime copies these and lays them out
for its kernels, without which a convolution is slow."""

Values = dict[str, NDArray[Any]]
"""Name in the graph -> value, of one sample."""

AfterSample = Callable[["Segment", int, Values], None]
"""Called with a segment, the index of a sample, and what the segment read and computed of it."""

AfterSegment = Callable[["Segment", Values], None]
"""Called with a segment after its last sample, and its weights as the graph reads them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        component: of the graph.
        name: the block, or "beginning".
        nodes: the nodes in order.
        constants: initializers that are no weights.
        weights: parameters that the nodes read.
        reads: values that come from earlier segments or are inputs of the graph.
        makes: values that later segments read or that are outputs of the graph.
        types: element type of every value.
    """

    component: Component
    name: str
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    weights: tuple[Weight, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    types: Mapping[str, int]

    @property
    def rows(self) -> dict[str, tuple[str, str]]:
        """Weights of which a sample needs only some rows, as those of an embedding -> name of the row numbers, which
        the segment reads, and of the value that the rows are."""
        used = Counter(name for node in self.nodes for name in read_by(node))
        names = {weight.name for weight in self.weights}
        return {
            node.input[0]: (node.input[1], node.output[0])
            for node in self.nodes
            if node.op_type == "Gather"
            and all(attribute.i == 0 for attribute in node.attribute if attribute.name == "axis")
            and node.input[0] in names
            and used[node.input[0]] == 1
            and node.input[1] in self.reads
        }

    def model(self, weights: BlockWeights, outputs: Sequence[str]) -> onnx.ModelProto:
        """The segment as a model with these outputs. What it reads and its float32 weights are inputs, because
        onnxruntime uses the memory of an input, and copies that of an initializer; few weights are initializers."""
        rows = {taken for _, taken in self.rows.values()}
        copied = weights.fed if weights.fed_bytes <= COPIED else {}
        fed = () if copied else weights.fed
        inputs = list(dict.fromkeys((*self.reads, *fed, *rows)))
        initializers = [numpy_helper.from_array(tensor, name) for name, tensor in copied.items()]
        graph = helper.make_graph(
            [node for node in self.nodes if rows.isdisjoint(node.output)],
            self.name,
            [helper.make_tensor_value_info(name, self.types[name], None) for name in inputs],
            [helper.make_tensor_value_info(name, self.types[name], None) for name in outputs],
            [*self.constants, *weights.stored, *initializers],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class Preparation(Protocol):
    """What has to be computed from other weights before a segment runs."""

    def names(self, segment: "Segment") -> Sequence[str]:
        """Tensors of the graph's subfolder that ``prepare`` needs; asked once, before it."""
        ...

    def prepare(self, segment: "Segment", tensors: Mapping[str, NDArray[Any]]) -> None:
        """Compute what ``segment`` reads, from these tensors as the checkpoint has them."""
        ...


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
                component=graph.component,
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
    preparation: Preparation | None = None,
    after_sample: AfterSample = lambda segment, sample, values: None,
    after_segment: AfterSegment = lambda segment, weights: None,
    start: int = 0,
    reached: Callable[[int], None] = lambda number: None,
    limit: int | None = None,
) -> None:
    """Run ``samples`` through ``graph``, in place.

    Args:
        graph: the component.
        readers: the checkpoint's tensors.
        samples: inputs of the graph before, its outputs after.
        progress: called after each segment.
        watch: see ``run_segments``.
        preparation: see ``run_segments``.
        after_sample: see ``run_segments``.
        after_segment: see ``run_segments``.
        start: see ``run_segments``.
        reached: called after each segment with the number of segments that are done.
        limit: number of segments after which to stop; None for all.
    """
    cut = segments(graph)
    check_weights([weight for segment in cut[start:limit] for weight in segment.weights], readers)
    ran = run_segments(
        cut[:limit],
        readers,
        samples,
        watch=watch,
        preparation=preparation,
        after_sample=after_sample,
        after_segment=after_segment,
        start=start,
        later=frozenset(name for segment in cut[limit or len(cut) :] for name in segment.reads),
    )
    for number, _ in enumerate(ran, start=start + 1):
        reached(number)
        progress(graph.component, number, len(cut))


def run_segments(
    cut: Sequence[Segment],
    readers: Readers,
    samples: Sequence[Values],
    *,
    watch: Mapping[str, Sequence[str]] | None = None,
    preparation: Preparation | None = None,
    after_sample: AfterSample = lambda segment, sample, values: None,
    after_segment: AfterSegment = lambda segment, weights: None,
    start: int = 0,
    later: frozenset[str] = frozenset(),
) -> Iterator[Segment]:
    """Run ``samples`` through the segments ``cut``, in place, and yield each segment after its last sample.

    A sample holds the graph's inputs before and its outputs after; values that nothing reads any more are dropped. The
    weights of one segment are in memory at a time.

    Args:
        cut: the segments of a graph.
        readers: the checkpoint's tensors.
        samples: the values of each sample, in front of segment ``start``.
        watch: weight -> values that ``after_sample`` also gets for the segment of that weight.
        preparation: of every segment.
        after_sample: called after every run with what the segment read and computed.
        after_segment: called after the last sample of every segment.
        start: number of the segment to begin with.
        later: values to keep although nothing in ``cut`` reads them.
    """
    watched = watch or {}
    for number, segment in enumerate(cut[start:], start=start):
        kept = read_later(cut, number) | later
        extra = [value for weight in segment.weights for value in watched.get(weight.name, ())]
        others = () if preparation is None else preparation.names(segment)
        weights = read_weights(segment.weights, segment.rows, others, readers)
        release_memory()
        if preparation is not None:
            preparation.prepare(segment, weights.others)
            weights.others.clear()
            release_memory()
        outputs = [name for name in extra if name not in segment.reads]
        with _session(segment, weights, outputs) as compute:
            for sample, values in enumerate(samples):
                computed = compute(values)
                after_sample(segment, sample, values | computed)
                values |= {name: computed[name] for name in segment.makes}
                for name in [name for name in values if name not in kept]:
                    del values[name]
                del computed
            after_segment(segment, weights.fed)
        del weights, compute
        yield segment


@contextmanager
def loaded(segment: Segment, readers: Readers) -> Iterator[Callable[[Values], Values]]:
    """A function from a sample's values to those that ``segment`` makes of them."""
    check_weights(segment.weights, readers)
    with _session(segment, read_weights(segment.weights, segment.rows, (), readers), ()) as compute:
        yield compute


@contextmanager
def _session(segment: Segment, weights: BlockWeights, extra: Sequence[str]) -> Iterator[Callable[[Values], Values]]:
    """A function from a sample's values to those that ``segment`` makes of them, and to the values ``extra``."""
    outputs = list(dict.fromkeys((*segment.makes, *extra)))
    rows = segment.rows
    with _failures(segment):
        session = _open(segment.model(weights, outputs), prepacked=weights.fed_bytes <= COPIED)

    def compute(values: Values) -> Values:
        feed = {name: values[name] for name in segment.reads} | weights.fed
        for name, (numbers, taken) in rows.items():
            feed[taken] = weights.rows_of(name, values[numbers])
        feed = {name: feed[name] for name in inputs}
        with _failures(segment):
            return dict(zip(outputs, session.run(outputs, feed), strict=True))

    inputs = [value.name for value in session.get_inputs()]
    yield compute


@contextmanager
def _failures(segment: Segment) -> Iterator[None]:
    """Say in which segment onnxruntime failed, whose exceptions have no common class."""
    try:
        yield
    except Exception as problem:
        raise CalibrationError(
            f"onnxruntime {ort.__version__} failed in {segment.name} of {segment.component} ({first_line(problem)}); "
            "free some memory and start again, or calibrate on a machine with more"
        ) from problem


def providers() -> list[str]:
    """The execution providers of onnxruntime that segments run on, the first choice first."""
    available = ort.get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]


def read_later(cut: Sequence[Segment], number: int) -> frozenset[str]:
    """Names that segments behind number ``number`` read, and the outputs of the graph."""
    return frozenset(name for segment in cut[number + 1 :] for name in segment.reads) | frozenset(cut[-1].makes)


def _open(model: onnx.ModelProto, *, prepacked: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # execute Q/DQ as written, products in float32
    if not prepacked:
        options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of an initializer
    options.enable_cpu_mem_arena = False  # frees memory between nodes
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers())
