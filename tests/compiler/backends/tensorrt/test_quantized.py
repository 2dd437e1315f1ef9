"""Engines of quantized graphs store and compute with quantized weights, in no more bytes than these take."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import write_graph
from qie.compiler.planning.profiles import profiles
from qie.compiler.quantization.linears import linear_inputs, linears
from qie.compiler.quantization.qdq import insert_qdq, quantize_by_recipe
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.weights.stream import write_weights
from qie.engines.bundle.manifest import (
    Component,
    EngineRecord,
    FileRecord,
    GraphRecord,
    QuantizationRecord,
    file_record,
)
from qie.engines.errors import BuildError, RecipeError
from tests.support.small_graphs import needs_rtx, small

RTX = BUILDERS["tensorrt-rtx"]
pytestmark = needs_rtx

WIDE = replace(ARCHITECTURES["tiny"], num_attention_heads=6, attention_head_dim=128, axes_dims_rope=(16, 56, 56))
"""28 million parameters in the transformer: enough for weights to be most of an engine."""


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    engine: EngineRecord
    engine_bytes: int
    quantized_bytes: int
    structure: dict[str, Any]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE, dtype="bfloat16")))


def make(checkpoint: Checkpoint, folder: Path, component: Component, scheme: Any, gpu: str) -> BuiltEngine:
    """The engine of one component with all its linears quantized but the first."""
    recipe, graph = small(gpu), GRAPHS[component](checkpoint.model, "bfloat16")
    total, names, record = len(linear_inputs(graph)), linears(graph), None
    if scheme != "none":
        names = names[1:]
        graph = insert_qdq(graph, SCHEMES[scheme], names, dict.fromkeys(names, 4.0), {})
        record = QuantizationRecord(scheme=scheme, quantized=len(names), linears=total)
    readers = {part: checkpoint.reader(part) for part in ("transformer", "text_encoder")}
    written = write_weights(graph.weights, readers, folder / "graph.weights")
    write_graph(graph, folder / "graph.onnx", "graph.weights", written.places)
    files = tuple(file_record(folder, name) for name in ("graph.onnx", "graph.weights"))
    graph_record = GraphRecord(
        component=component,
        backend="tensorrt-rtx",
        precision="bfloat16",
        key="k",
        path="graph.onnx",
        files=files,
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters(),
        profiles=profiles(graph, recipe, checkpoint.model),
        quantization=record,
    )
    engine = RTX.build(graph_record, folder, key="k", recipe=recipe)
    assert engine.structure is not None
    quantized_bytes = sum(
        length for name, (_, length) in written.places.items() if name.removesuffix(".weight") in names
    )
    return BuiltEngine(
        engine=engine,
        engine_bytes=engine.files[0].bytes,
        quantized_bytes=quantized_bytes,
        structure=json.loads((folder / engine.structure.path).read_text()),
    )


@pytest.mark.parametrize(
    ("component", "scheme", "gpu", "dtype", "share"),
    [
        ("transformer", "fp8", "l40s", "FP8", 0.5),
        ("transformer", "int8-smooth", "a100", "INT8", 0.5),
    ],
)
def test_engines_store_quantized_weights(
    wide: Checkpoint, tmp_path: Path, component: Component, scheme: str, gpu: str, dtype: str, share: float
) -> None:
    folders = [tmp_path / name for name in ("plain", "quantized")]
    for folder in folders:
        folder.mkdir()
    plain, quantized = (
        make(wide, folder, component, s, gpu) for folder, s in zip(folders, ("none", scheme), strict=True)
    )
    record = quantized.engine.quantization
    assert record is not None
    assert plain.engine.quantization is None
    assert record.quantized == len(linears(GRAPHS[component](wide.model, "bfloat16"))) - 1
    assert record.fused == record.quantized
    saved = plain.engine_bytes - quantized.engine_bytes
    assert saved == pytest.approx(quantized.quantized_bytes * (1 / share - 1), rel=0.05)
    constants = [
        row for row in quantized.structure["layers"] if row[1] == "CONSTANT" and row[2] and row[2][0][0] == dtype
    ]
    assert len(constants) == record.quantized
    assert dtype not in plain.structure["layer_dtypes"]
    assert quantized.structure["attention"] == plain.structure["attention"]
    assert quantized.structure["products"].keys() == {"bf16"}


def test_attention_in_fp8_is_one_kernel_in_bfloat16(checkpoint: Path, tmp_path: Path) -> None:
    """Which is why recipes refuse it; counting nodes needs no calibration."""
    recipe, opened = small("l40s"), open_checkpoint(str(checkpoint))
    section = replace(recipe.components.transformer, attention="fp8")
    graph = quantize_by_recipe(
        GRAPHS["transformer"](opened.model, "bfloat16"), section, None, opened.model.language
    ).graph
    written = write_weights(graph.weights, {"transformer": opened.reader("transformer")}, tmp_path / "w")
    write_graph(graph, tmp_path / "g.onnx", "w", written.places)
    graph_record = GraphRecord(
        component="transformer", backend="tensorrt-rtx", precision="bfloat16", key="k", path="g.onnx",
        files=tuple(FileRecord(path=n, bytes=1, sha256="0" * 64) for n in ("g.onnx", "w")),
        inputs=graph.inputs, outputs=graph.outputs, parameters=1,
        profiles=profiles(graph, recipe, opened.model),
    )  # fmt: skip
    engine = RTX.build(graph_record, tmp_path, key="k", recipe=recipe)
    assert engine.structure is not None
    structure = json.loads((tmp_path / engine.structure.path).read_text())
    assert structure["attention"] == {"layers": 2, "fused": 2, "types": ["bf16"]}
    assert structure["layer_dtypes"]["FP8"] >= 6


@pytest.mark.parametrize("scheme", ["fp8", "w8a16", "w4a16"])
def test_the_language_model(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    quantized = make(open_checkpoint(str(checkpoint)), tmp_path, "language", scheme, "l40s")
    assert quantized.engine.quantization is not None
    assert quantized.engine.quantization.quantized > 0


def test_no_fp8_before_ada(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="computes in FP8"):
        make(open_checkpoint(str(checkpoint)), tmp_path, "transformer", "fp8", "a100")


def test_a_compiler_that_widens_weights_is_an_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qie.compiler.backends.tensorrt.builder as module

    monkeypatch.setattr(module, "QUANTIZED_DTYPES", ("FP4",))
    with pytest.raises(BuildError, match=r"has 0 quantized weights, expected \d+ as in its graph; use another version"):
        make(open_checkpoint(str(checkpoint)), tmp_path, "language", "fp8", "l40s")
