"""Engines of a whole checkpoint, compiled by TensorRT for RTX."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest

from qie.compiler.packing import build as packing
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.profiles import profiles
from qie.engines.bundle.bundle import Bundle, verify
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord
from qie.engines.terminal import human_bytes, human_memory, human_seconds
from tests.support.bundles import planned
from tests.support.engine_bytes import io_dims
from tests.support.small_graphs import small

trt = pytest.importorskip("tensorrt_rtx")

Qie = Callable[..., CompletedProcess[str]]

ATTENTION = {"vision": 2, "language": 2, "vae_encoder": 0, "transformer": 2, "vae_decoder": 0}
"""Attention layers of the tiny checkpoint that compile to one kernel each; the VAE's is written out instead."""


@pytest.fixture(scope="module", params=["l40s", "a100"])
def built(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Built":
    """The tiny checkpoint built for compute capability 8.9 and 8.0; tests must not change it."""
    calls: list[tuple[str, int, int]] = []
    plan = planned(checkpoint, tmp_path_factory.mktemp(request.param) / "bundle", small(request.param))
    bundle = packing.build(plan, progress=lambda *call: calls.append(call))
    return Built(plan=plan, bundle=bundle, calls=calls, capability={"l40s": "8.9", "a100": "8.0"}[request.param])


class Built(SimpleNamespace):
    plan: Plan
    bundle: Bundle
    calls: list[tuple[str, int, int]]
    capability: str


def structure(bundle: Bundle, engine: EngineRecord) -> dict[str, Any]:
    assert engine.structure is not None
    content: dict[str, Any] = json.loads((bundle.path / engine.structure.path).read_text())
    return content


def test_all_five_components_are_built(built: Built) -> None:
    engines = built.bundle.manifest.engines
    assert [engine.component for engine in engines] == list(COMPONENTS)
    for engine, part in zip(engines, built.plan.components, strict=True):
        assert (engine.backend, engine.compute_capability) == ("tensorrt-rtx", built.capability)
        assert (engine.backend_version, engine.precision) == (trt.__version__, "bfloat16")
        assert (engine.inputs, engine.outputs) == (part.graph.inputs, part.graph.outputs)
        assert engine.parameters == part.parameters
        assert [file.path for file in engine.files] == [engine.path]
        assert engine.files[0].bytes > part.bytes  # the weights are in it
        assert engine.build_seconds > 0
        assert engine.activation_bytes is not None
        assert engine.activation_bytes > 0
        assert engine.files[0].bytes < engine.build_peak_bytes < 2**30  # of the compiler, not of this process
    verify(built.bundle)


def test_the_engine_has_the_shapes_of_the_recipe(built: Built) -> None:
    """As read back from TensorRT."""
    for engine, part in zip(built.bundle.manifest.engines, built.plan.components, strict=True):
        assert engine.profiles == profiles(part.graph, built.plan.recipe, built.plan.model)
        assert engine.profiles


def test_a_dim_is_constant_where_the_profile_has_one_size(built: Built) -> None:
    """What a session compares with the manifest: a symbol, or the size of a profile with min == max, like the batch."""
    fixed = 0
    for engine in built.bundle.manifest.engines:
        content = (built.bundle.path / engine.path).read_bytes()
        specs = {spec.name: spec.dims for spec in engine.inputs}
        ranges = {
            dim: (low, high)
            for profile in engine.profiles
            for dim, low, high in zip(specs[profile.input], profile.min, profile.max, strict=True)
        }
        symbols: dict[int | str, int] = {}
        for spec in (*engine.inputs, *engine.outputs):
            dims = io_dims(content, spec.name)
            assert len(dims) == len(spec.dims)
            for dim, found in zip(spec.dims, dims, strict=True):
                low, high = (dim, dim) if isinstance(dim, int) else ranges.get(dim, (0, 1))
                assert found == low if low == high else found < 0, (engine.component, spec.name)
                if low == high:
                    fixed += isinstance(dim, str)
                elif dim in ranges:
                    assert symbols.setdefault(dim, found) == found
        assert len(set(symbols.values())) == len(symbols)
    assert fixed == 8  # batches of the language model and of the VAE


def test_attention_is_one_kernel_a_block(built: Built) -> None:
    for engine in built.bundle.manifest.engines:
        content = structure(built.bundle, engine)
        count = ATTENTION[engine.component]
        assert content["attention"] == {"layers": count, "fused": count, "types": ["bf16"] if count else []}
        fused = [layers for name, layers in content["kernels"] if "mha" in name]
        assert all(len(layers) == 1 and "Attention" in layers[0] for layers in fused)


def test_the_structure_names_layers_types_and_precisions(built: Built) -> None:
    for engine, part in zip(built.bundle.manifest.engines, built.plan.components, strict=True):
        content = structure(built.bundle, engine)
        assert sum(content["layer_types"].values()) == len(content["layers"]) > part.nodes / 2
        assert content["layer_dtypes"]["BF16"] > 50
        products = [outputs[0] for _, kind, outputs in content["layers"] if kind in ("MATRIX_MULTIPLY", "CONVOLUTION")]
        assert products
        assert {dtype for dtype, _ in products} == {"BF16"}
        nodes = {node.name for node in part.graph.model.graph}
        named = {layer for _, layers in content["kernels"] for layer in layers}
        assert len(nodes & named) > len(nodes) / 2
        assert content["largest_buffer_bytes"] > 0
        assert content["allocations"] == 0


def test_the_files_of_a_bundle(built: Built) -> None:
    """The recipe of the A100 prefers TensorRT, which builds on a machine with one, so its bundle keeps the graphs."""
    manifest, folder = built.bundle.manifest, built.bundle.path
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "manifest.json",
        *(record.path for record in manifest.files()),
    }
    if built.capability == "8.9":
        assert manifest.graphs == ()
        assert list(folder.glob("*.onnx")) == []
        assert list(folder.glob("*.weights")) == []
        return
    assert [graph.component for graph in manifest.graphs] == list(COMPONENTS)
    for graph, engine in zip(manifest.graphs, manifest.engines, strict=True):
        assert (graph.backend, graph.precision, graph.profiles) == ("tensorrt", "bfloat16", engine.profiles)
        assert [file.path for file in graph.files] == [f"{graph.component}.onnx", f"{graph.component}.weights"]
    counted = sum(2 * part.bytes for part in built.plan.components)
    assert built.plan.bytes == counted + built.plan.modulation_bytes + built.plan.tables_bytes


def test_progress_rises_to_the_end(built: Built) -> None:
    for component in COMPONENTS:
        compiled = [(done, total) for what, done, total in built.calls if what == f"compile {component}"]
        assert {total for _, total in compiled} == {1000}
        done = [count for count, _ in compiled]
        assert done == sorted(set(done))
        assert len(done) > 20
        assert done[-1] == 1000


def test_a_second_build_keeps_the_engines(built: Built, tmp_path: Path) -> None:
    path = Path(shutil.copytree(built.bundle.path, tmp_path / "bundle"))
    calls: list[str] = []
    again = packing.build(replace(built.plan, destination=path), progress=lambda what, done, total: calls.append(what))
    assert again.manifest == built.bundle.manifest
    assert not any(what.startswith("compile") or what in COMPONENTS for what in calls)
    recipe = built.plan.recipe
    wider = replace(recipe, shapes=replace(recipe.shapes, batch=replace(recipe.shapes.batch, max=2)))
    changed = packing.build(replace(built.plan, destination=path, recipe=wider))
    before, after = ({e.component: e.key for e in b.manifest.engines} for b in (again, changed))
    assert {c for c in COMPONENTS if before[c] != after[c]} == {"transformer"}
    verify(changed)


def test_inspect_shows_it(built: Built, qie: Qie) -> None:
    """Time, memory, shapes and structure of the engines, and the engines still to build."""
    shown = qie("inspect", built.bundle.path).stdout
    for engine in built.bundle.manifest.engines:
        assert engine.activation_bytes is not None
        target = rf"tensorrt-rtx/{built.capability} +bfloat16 +\S+ k +{human_bytes(engine.files[0].bytes)} +no"
        assert re.search(rf"^{engine.component} +{target}$", shown, re.MULTILINE), shown
        memory = rf"{human_memory(engine.build_peak_bytes)} +{human_memory(engine.activation_bytes)}"
        figures = rf"tensorrt-rtx {engine.backend_version} +{human_seconds(engine.build_seconds)} +{memory}"
        assert re.search(rf"^{engine.component} +{figures}$", shown, re.MULTILINE), shown
        first = engine.profiles[0]
        ends = " +".join(" x ".join(map(str, dims)) for dims in (first.min, first.opt, first.max))
        assert re.search(rf"^{engine.component} +{first.input} +{ends}$", shown, re.MULTILINE), shown
        layers, count = len(structure(built.bundle, engine)["layers"]), ATTENTION[engine.component]
        fused = f"{count} in bf16" if count else "0"
        assert re.search(
            rf"^{engine.component} +{layers} +\d+ +{count} +{fused} +[\d.]+ [KM]iB +0$", shown, re.MULTILINE
        )
    unfinished = re.findall(r"^(\w+) +tensorrt +bfloat16 +[\d.]+ k +[\d.]+ kB$", shown, re.MULTILINE)
    assert unfinished == (list(COMPONENTS) if built.capability == "8.0" else [])
    assert ("qie build --finish" in shown) == (built.capability == "8.0")
