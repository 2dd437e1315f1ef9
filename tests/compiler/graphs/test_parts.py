"""Parts: where graphs are cut, what crosses, and that parts compute what the whole does, bit for bit."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import POCKET, Checkpoint, open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.graphs.parts import balanced, block_bytes, split
from qie.compiler.packing.sources import write_part
from qie.compiler.quantization.linears import linears
from qie.compiler.quantization.qdq import insert_qdq
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.load import load_recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.manifest import Component, EngineRecord, GraphRecord, QuantizationRecord
from qie.engines.progress import no_progress
from qie.engines.sessions.load import load_parts
from tests.support.tensorrt_sessions import Arrays, run, same, values

SIZES = {
    "transformer": {
        "batch": 2, "noise_tokens": 16, "reference_tokens": 20, "latent_tokens": 36, "text_tokens": 9, "tokens": 45,
        "steps": 4, "steps_of_blocks": 20,
    },
    "language": {"batch": 2, "prompt_tokens": 80, "image_tokens": 5, "text_tokens": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def pocket() -> Checkpoint:
    """Five blocks in the transformer, three in the language model."""
    return open_checkpoint(str(POCKET))


def graph_of(pocket: Checkpoint, component: Component, scheme: Any = "none") -> Graph:
    """The graph in float32; with a scheme, all its linears are quantized."""
    graph = GRAPHS[component](pocket.model, "float32")
    if scheme == "none":
        return graph
    names = linears(graph)
    return insert_qdq(graph, SCHEMES[scheme], names, dict.fromkeys(names, 4.0), {})


def engines_of(parts: tuple[Graph, ...], pocket: Checkpoint, scheme: str, folder: Path) -> list[EngineRecord]:
    readers: Mapping[Any, Any] = pocket.readers()
    engines = []
    for number, part in enumerate(parts):
        path, files = write_part(part, f"{len(parts)}.{number}", readers, folder, no_progress)
        record = GraphRecord(
            component=part.component,
            backend="onnxruntime",
            precision=part.dtype,
            key="0" * 64,
            path=path,
            files=files,
            inputs=part.inputs,
            outputs=part.outputs,
            parameters=part.parameters(),
            profiles=(),
            quantization=None if scheme == "none" else QuantizationRecord(scheme=scheme, quantized=1, linears=1),
            part=number,
        )
        engines.append(BUILDERS["onnxruntime"].build(record, folder, key="k", recipe=load_recipe("cpu")))
    return engines


def computed(parts: tuple[Graph, ...], whole: Graph, pocket: Checkpoint, scheme: str, folder: Path) -> Arrays:
    session = load_parts(folder, engines_of(parts, pocket, scheme, folder))
    sizes = SIZES[whole.component]
    try:
        return run(session, values(whole.inputs, sizes), sizes, whole.outputs)
    finally:
        session.close()


@pytest.mark.parametrize(
    ("component", "scheme", "counts"),
    [
        ("transformer", "none", (2, 3, 5)),
        ("transformer", "fp8", (3,)),
        ("transformer", "int8-smooth", (2,)),
        ("language", "none", (2,)),
        ("language", "w8a16", (3,)),
    ],
)
def test_parts_compute_what_the_whole_does(
    pocket: Checkpoint, tmp_path: Path, component: Component, scheme: str, counts: tuple[int, ...]
) -> None:
    whole = graph_of(pocket, component, scheme)
    expected = computed((whole,), whole, pocket, scheme, tmp_path)
    for count in counts:
        assert same(computed(split(whole, count), whole, pocket, scheme, tmp_path), expected)


def test_what_crosses(pocket: Checkpoint) -> None:
    """Hidden states alone; each part has the inputs that it reads, and its own weights."""
    whole = graph_of(pocket, "transformer", "fp8")
    first, second, last = split(whole, 3)
    hidden = [(spec.name, spec.dims[:-1]) for spec in first.outputs]
    assert hidden == [("image_hidden_1", ("batch", "latent_tokens")), ("text_hidden_1", ("batch", "text_tokens"))]
    assert second.inputs[-2:] == first.outputs and last.inputs[-2:] == second.outputs
    assert last.outputs == whole.outputs
    step = {"modulation_out", "negative_velocity", "guidance", "dsigma"}
    assert not step & {spec.name for part in (first, second) for spec in part.inputs}
    assert {spec.name for spec in last.inputs[:-2]} == {spec.name for spec in whole.inputs}
    assert [weight for part in (first, second, last) for weight in part.weights] == list(whole.weights)
    assert len({part.digest() for part in (whole, first, second, last)}) == 4
    assert whole.digest() == graph_of(pocket, "transformer", "fp8").digest()  # which was only read


def test_the_language_model_reads_ids_once(pocket: Checkpoint) -> None:
    _, last = split(graph_of(pocket, "language"), 2)
    assert [spec.name for spec in last.inputs] == ["position_ids", "hidden_1"]


def test_one_part_is_the_graph_itself(pocket: Checkpoint) -> None:
    graph = graph_of(pocket, "language")
    assert split(graph, 1) == (graph,)


def test_the_parts_are_about_equally_large(pocket: Checkpoint) -> None:
    graph = graph_of(pocket, "transformer")
    sizes = block_bytes(graph)
    assert len(sizes) == 5
    blocks = balanced(sizes, 3)
    starts = [sum(blocks[:number]) for number in range(4)]
    expected = [sum(sizes[start:end]) for start, end in pairwise(starts)]
    assert [total_bytes(part.weights) for part in split(graph, 3)] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([1] * 10, 3, (3, 3, 4)),
        ([5, 1, 1, 1, 1, 1], 2, (1, 5)),
        ([1, 2, 3], 3, (1, 1, 1)),
        ([1, 2, 3], 1, (3,)),
        ([3, 1, 1, 1, 1, 1, 1], 3, (1, 3, 3)),
        ([1, 1, 9], 2, (2, 1)),
    ],
)
def test_blocks_are_divided_evenly(sizes: list[int], count: int, expected: tuple[int, ...]) -> None:
    assert balanced(sizes, count) == expected
