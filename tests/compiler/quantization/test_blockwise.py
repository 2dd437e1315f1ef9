"""Block by block is the whole: the same values, of every component, and nothing kept that nobody reads."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph, write_graph
from qie.compiler.quantization import blockwise
from qie.compiler.quantization.blockwise import Values, run_segments, segments
from qie.compiler.weights.stream import write_weights
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.errors import CalibrationError

SIZES = {
    "batch": 1, "noise_tokens": 12, "reference_tokens": 8, "text_tokens": 5, "tokens": 25, "patches": 16,
    "steps": 1, "steps_of_blocks": 2, "image_tokens": 4, "prompt_tokens": 70, "height": 64, "width": 32, "rows": 4,
    "columns": 2,
}  # fmt: skip


def draw(graph: Graph) -> Values:
    rng = np.random.default_rng(0)
    made: Values = {}
    for spec in graph.inputs:
        shape = spec.shape(SIZES)
        match spec.dtype:
            case "float32":
                made[spec.name] = rng.uniform(-1, 1, shape).astype(np.float32)
            case "uint8":
                made[spec.name] = rng.integers(0, 256, shape, np.uint8)
            case _:
                made[spec.name] = np.broadcast_to(np.arange(shape[-1]) % 4, shape).astype(np.int64)
    return made


@pytest.mark.parametrize("copied", [0, 256_000_000])
@pytest.mark.parametrize("component", COMPONENTS)
def test_pieces_are_the_whole(
    checkpoint: Path, component: Component, copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "COPIED", copied)
    opened = open_checkpoint(str(checkpoint))
    readers: dict[Any, TensorReader] = {part: opened.reader(part) for part in ("transformer", "text_encoder", "vae")}
    graph = GRAPHS[component](opened.model, "float32")
    inputs = draw(graph)
    written = write_weights(graph.weights, readers, tmp_path / "weights")
    write_graph(graph, tmp_path / "graph.onnx", "weights", written.places)
    whole = ort.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in graph.outputs]
    expected = dict(zip(names, whole.run(names, inputs), strict=True))

    pieces = segments(GRAPHS[component](opened.model, "float32"))
    samples = [dict(inputs), dict(inputs)]
    held = []
    for piece in run_segments(pieces, readers, samples):
        held.append((piece.name, set(samples[0])))
    for sample in samples:
        assert sample.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1 if value.dtype == np.uint8 else 1e-5  # other kernels than those of constant weights
            np.testing.assert_allclose(sample[name].astype(float), value.astype(float), rtol=1e-5, atol=tolerance)
    if component in ("transformer", "language", "vision"):
        assert len(pieces) == 1 + len(
            {w.name.split(".")[-4] for w in graph.weights if "norm_q" in w.name} or pieces[1:]
        )
    used = [{weight.name for weight in piece.weights} for piece in pieces]
    assert set.union(*used) == {weight.name for weight in graph.weights}
    for number, (_, names_then) in enumerate(held[:-1]):
        read = {name for piece in pieces[number + 1 :] for name in piece.reads} | expected.keys()
        assert names_then <= read


def test_a_block_has_its_own_weights_and_no_others(checkpoint: Path) -> None:
    graph = GRAPHS["transformer"](open_checkpoint(str(checkpoint)).model, "float32")
    pieces = segments(graph)
    assert [piece.name for piece in pieces] == ["beginning", "transformer_blocks.0", "transformer_blocks.1"]
    for piece in pieces[1:-1]:
        assert all(weight.name.startswith(f"{piece.name}.") for weight in piece.weights)
    assert {w.name for w in pieces[-1].weights if not w.name.startswith("transformer_blocks.1.")} == {
        "proj_out.weight",
        "proj_out.bias",
    }


def test_a_failure_of_onnxruntime_names_the_block(checkpoint: Path, readers: dict[Any, TensorReader]) -> None:
    graph = GRAPHS["transformer"](open_checkpoint(str(checkpoint)).model, "float32")
    values = draw(graph)
    values["prompt_embeds"] = values["prompt_embeds"][..., :-1]
    with pytest.raises(CalibrationError, match=r"onnxruntime .* failed in beginning of transformer \(.*\); free some"):
        list(run_segments(segments(graph), readers, [values]))
