"""Engines by TensorRT for RTX, really compiled: of a whole checkpoint, and of layers of the published width."""

import json
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorrt_rtx as trt

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.graphs.components import write_graph_of
from qie.compiler.graphs.graph import write_graph
from qie.compiler.packing.pack import build_bundle
from qie.compiler.planning.plan import Plan, check_buildable, engine_key, graph_keys
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Weight
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, verify
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, FileRecord, GraphRecord, ProfileRecord
from qie.engines.errors import BackendMissingError, BuildError, QieError
from qie.engines.terminal import human_bytes
from tests.support.bundles import planned
from tests.support.hand_made import SHAPES, Worker, linear, record, small

Qie = Callable[..., CompletedProcess[str]]

RTX = BUILDERS["tensorrt-rtx"]
ATTENTION = {"vision": 2, "language": 2, "vae_encoder": 0, "transformer": 2, "vae_decoder": 0}
"""Attention layers of the tiny checkpoint that can be one kernel each; the VAE's cannot, and is written out."""


@pytest.fixture(scope="module", params=["l40s", "a100"])
def built(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Built":
    """The tiny checkpoint built for 8.9 and for 8.0; not to be changed."""
    calls: list[tuple[str, int, int]] = []
    plan = planned(checkpoint, tmp_path_factory.mktemp(request.param) / "bundle", small(request.param))
    bundle = build_bundle(plan, progress=lambda *call: calls.append(call))
    return Built(plan=plan, bundle=bundle, calls=calls, capability={"l40s": "8.9", "a100": "8.0"}[request.param])


class Built(SimpleNamespace):
    plan: Plan
    bundle: Bundle
    calls: list[tuple[str, int, int]]
    capability: str


def structure(bundle: Bundle, engine: EngineRecord) -> dict[str, Any]:
    assert engine.structure is not None
    found: dict[str, Any] = json.loads((bundle.path / engine.structure.path).read_text())
    return found


# Engines of a whole checkpoint


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
        assert engine.files[0].bytes < engine.build_peak_bytes < 2**30  # the compiler's own, not this process's
    verify(built.bundle)


def test_the_engine_has_the_shapes_of_the_recipe(built: Built) -> None:
    """As TensorRT holds them after they were set."""
    for engine, part in zip(built.bundle.manifest.engines, built.plan.components, strict=True):
        assert engine.profiles == profiles(part.graph, built.plan.recipe, built.plan.model)
        assert engine.profiles


def test_attention_is_one_kernel_a_block(built: Built) -> None:
    for engine in built.bundle.manifest.engines:
        found = structure(built.bundle, engine)
        assert found["attention"] == {"layers": ATTENTION[engine.component], "fused": ATTENTION[engine.component]}
        fused = [layers for name, layers in found["kernels"] if "mha" in name]
        assert all(len(layers) == 1 and "Attention" in layers[0] for layers in fused)


def test_the_structure_names_layers_types_and_precisions(built: Built) -> None:
    for engine, part in zip(built.bundle.manifest.engines, built.plan.components, strict=True):
        found = structure(built.bundle, engine)
        assert sum(found["layer_types"].values()) == len(found["layers"]) > part.nodes / 2
        assert found["layer_dtypes"]["BF16"] > 50
        products = [outputs[0] for _, kind, outputs in found["layers"] if kind in ("MATRIX_MULTIPLY", "CONVOLUTION")]
        assert products
        assert {dtype for dtype, _ in products} == {"BF16"}
        nodes = {node.name for node in part.graph.model.graph}
        named = {layer for _, layers in found["kernels"] for layer in layers}
        assert len(nodes & named) > len(nodes) / 2
        assert found["largest_buffer_bytes"] > 0
        assert found["allocations"] == 0


def test_what_a_bundle_holds(built: Built) -> None:
    """The A100's recipe prefers TensorRT, which builds on its machine: there the graphs stay, and nowhere else."""
    manifest, folder = built.bundle.manifest, built.bundle.path
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "manifest.json",
        *(record.path for record in manifest.files()),
    }
    if built.capability == "8.9":
        assert manifest.graphs == ()
        assert list(folder.glob("*.onnx")) == []
        assert [path.name for path in folder.glob("*.weights")] == ["modulation.weights"]
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
    again = build_bundle(replace(built.plan, destination=path), progress=lambda what, done, total: calls.append(what))
    assert again.manifest == built.bundle.manifest
    assert not any(what.startswith("compile") or what in COMPONENTS for what in calls)
    recipe = built.plan.recipe
    wider = replace(recipe, shapes=replace(recipe.shapes, batch=replace(recipe.shapes.batch, max=2)))
    changed = build_bundle(replace(built.plan, destination=path, recipe=wider))
    before, after = ({e.component: e.key for e in b.manifest.engines} for b in (again, changed))
    assert {c for c in COMPONENTS if before[c] != after[c]} == {"transformer"}
    verify(changed)


def test_inspect_shows_it(built: Built, qie: Qie) -> None:
    """Time, memory, shapes and what the engines are made of; and what is yet to be built."""
    shown = qie("inspect", built.bundle.path).stdout
    for engine in built.bundle.manifest.engines:
        assert engine.activation_bytes is not None
        figures = rf"{engine.build_seconds:.1f} s +{human_bytes(engine.build_peak_bytes)}"
        target = rf"tensorrt-rtx/{built.capability} +{engine.backend_version} +bfloat16"
        size = rf"{human_bytes(engine.files[0].bytes)} +{human_bytes(engine.activation_bytes)}"
        assert re.search(rf"^{engine.component} +{target} +\S+ k +{size} +{figures} +no$", shown, re.MULTILINE), shown
        first = engine.profiles[0]
        ends = " +".join(" x ".join(map(str, dims)) for dims in (first.min, first.opt, first.max))
        assert re.search(rf"^{engine.component} +{first.input} +{ends}$", shown, re.MULTILINE), shown
        layers, count = len(structure(built.bundle, engine)["layers"]), ATTENTION[engine.component]
        assert re.search(rf"^{engine.component} +{layers} +\d+ +{count} +{count} +[\d.]+ MB +0$", shown, re.MULTILINE)
    waits = re.findall(r"^(\w+) +tensorrt +bfloat16 +[\d.]+ k +[\d.]+ kB$", shown, re.MULTILINE)
    assert waits == (list(COMPONENTS) if built.capability == "8.0" else [])
    assert ("qie build --finish" in shown) == (built.capability == "8.0")


# Keys


def test_what_decides_an_engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(checkpoint, tmp_path, small("l40s"))
    graphs, recipe = graph_keys(plan, "digest"), plan.recipe
    assert len(set(graphs.values())) == len(COMPONENTS)
    assert all(graphs[c] != other for c, other in graph_keys(plan, "another digest").items())
    graph = graphs["transformer"]
    shapes = profiles(plan.components[3].graph, recipe, plan.model)

    def key(backend: str = "tensorrt-rtx", recipe: Recipe = recipe, shapes: tuple[ProfileRecord, ...] = shapes) -> str:
        return engine_key(graph, backend, recipe, shapes)

    keys = [
        key(),
        key(recipe=replace(recipe, compute_capability="8.0")),
        key(recipe=replace(recipe, memory_gib=24)),
        key(recipe=replace(recipe, limits=replace(recipe.limits, build_workspace_gib=1))),
        key(shapes=shapes[1:]),
        key("onnxruntime"),
        engine_key(graphs["vision"], "tensorrt-rtx", recipe, shapes),
    ]
    assert len(set(keys)) == len(keys)
    assert key(recipe=replace(recipe, residency="sequential")) == key()
    with monkeypatch.context() as patch:
        patch.setattr(trt, "__version__", "99.0")
        assert key() not in keys
    assert key() == keys[0]


# Who builds


@pytest.fixture
def set_facts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change facts of a backend: ``set_facts("tensorrt", build_module="tensorrt_rtx")``."""
    return lambda backend, **facts: monkeypatch.setitem(BACKENDS, backend, replace(BACKENDS[backend], **facts))


def test_a_builder_says_why_it_cannot_build(gpus: Callable[..., None], set_facts: Callable[..., None]) -> None:
    a100 = load_recipe("a100")
    assert RTX.unavailable(a100) is None
    assert re.search(r"does not compile for compute capability 9\.0", str(RTX.unavailable(load_recipe("h100"))))
    full = BUILDERS["tensorrt"]
    set_facts("tensorrt", build_module="no_such_tensorrt", build_install="pip install x")
    assert full.unavailable(a100) == "tensorrt is not installed; run `pip install x`"
    set_facts("tensorrt", build_module="tensorrt_rtx")
    gpus()
    assert re.search(r"none of compute capability 8\.0 \(it has no GPU\); build there", str(full.unavailable(a100)))
    gpus("8.9", "8.6")
    assert re.search(r"its GPUs have 8\.9, 8\.6", str(full.unavailable(a100)))
    gpus("8.9", "8.0")
    assert full.unavailable(a100) is None


def test_the_first_builder_that_can_is_chosen(checkpoint: Path, tmp_path: Path) -> None:
    chosen = {
        name: {(part.backend, part.finish) for part in planned(checkpoint, tmp_path, small(name)).components}
        for name in ("cpu", "l40s", "a100", "h100", "rtx5090")
    }
    assert chosen == {
        "cpu": {("onnxruntime", None)},
        "l40s": {("tensorrt-rtx", None)},
        "rtx5090": {("tensorrt-rtx", None)},
        "a100": {("tensorrt-rtx", "tensorrt")},
        "h100": {(None, "tensorrt")},
    }


def test_without_the_package_nothing_is_built(checkpoint: Path, tmp_path: Path, set_facts: Callable[..., None]) -> None:
    """It could be installed here, so there is nothing to be finished elsewhere."""
    set_facts("tensorrt-rtx", build_module="no_such_rtx")
    plan = planned(checkpoint, tmp_path / "out", small("l40s"))
    assert {(part.backend, part.finish) for part in plan.components} == {(None, None)}
    with pytest.raises(BackendMissingError, match=r"tensorrt-rtx is not installed; run `pip install 'qie\[compile\]'`"):
        check_buildable(plan)


# What the worker is told


def test_the_timing_cache_is_the_gpus(
    gpus: Callable[..., None], set_facts: Callable[..., None], tmp_path: Path, qie_home: Path, worker: Worker
) -> None:
    """And of several GPUs the worker sees the recipe's."""
    gpus("8.9", "8.0")
    seen = tmp_path / "seen"
    worker(
        f"job = json.load(sys.stdin); Path({str(seen)!r}).write_text(json.dumps([job['timing_cache'], "
        "os.environ.get('CUDA_VISIBLE_DEVICES')])); tell(failed=['stopped'])"
    )
    set_facts("tensorrt", build_module="tensorrt_rtx")
    with pytest.raises(BuildError, match="stopped"):
        BUILDERS["tensorrt"].build(record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=small("a100"))
    assert json.loads(seen.read_text()) == [str(qie_home / "timing" / f"gpu-8-0-{trt.__version__}.cache"), "1"]


def test_weights_that_the_card_cannot_hold_may_be_streamed(tmp_path: Path, worker: Worker) -> None:
    graph = record(tmp_path, linear(), **SHAPES)
    seen = tmp_path / "seen"
    worker(f"Path({str(seen)!r}).write_text(sys.stdin.read()); tell(failed=['stopped'])")
    for gib, expected in ((17, False), (19, True)):
        weights = FileRecord(path="transformer.weights", bytes=gib * 2**30, sha256="")
        with pytest.raises(QieError):
            RTX.build(
                replace(graph, files=(*graph.files, weights)),
                tmp_path,
                key="k",
                recipe=replace(small("l40s"), memory_gib=24),
            )
        assert json.loads(seen.read_text())["weight_streaming"] is expected


# Full width


LAYERS = {"transformer": 2, "vision": 2, "language": 1}


class RandomReader:
    """Random weights in the checkpoint's shapes; zeros would be folded away by the compiler."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self._weights = {weight.name: weight for weight in weights}

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights[name]
        if "last_frame" in weight.layout:
            return (*weight.shape[:2], 1, *weight.shape[2:])
        return weight.shape[::-1] if "transpose" in weight.layout else weight.shape

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read(self, name: str) -> Any:
        """Of either sign, from 1/128 to 1/64."""
        shape = self.shape(name)
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**16, shape, np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[GraphRecord, Path]]:
    """A component of the published 2511 with the layers of LAYERS; the transformer has 24 heads of 128."""
    architecture = replace(
        ARCHITECTURES["qwen-image-edit-2511"],
        num_layers=LAYERS["transformer"],
        text_layers=LAYERS["language"],
        text_vocab_size=2048,
        vision_depth=LAYERS["vision"],
        vision_fullatt_block_indexes=(1,),
    )
    folder = tmp_path_factory.mktemp("full")
    checkpoint = open_checkpoint(str(write_checkpoint(folder / "c", architecture, weights=False)), weights=False)
    recipe = load_recipe("l40s")

    def make(component: Any) -> tuple[GraphRecord, Path]:
        graph = write_graph_of(component, checkpoint.model, recipe)
        reader = RandomReader(graph.weights)
        written = write_weights(
            graph.weights, {weight.subfolder: reader for weight in graph.weights}, folder / "weights"
        )
        write_graph(graph, folder / "graph.onnx", "weights", {e.name: (e.offset, e.length) for e in written.entries})
        found = GraphRecord(
            component=component,
            backend="tensorrt-rtx",
            precision=graph.dtype,
            key="0" * 64,
            path="graph.onnx",
            files=(FileRecord(path="weights", bytes=written.bytes, sha256=written.sha256),),
            inputs=graph.inputs,
            outputs=graph.outputs,
            parameters=graph.parameters(),
            profiles=profiles(graph, recipe, checkpoint.model),
        )
        return found, folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("component", LAYERS)
def test_attention_at_full_width(full_width: Callable[[str], tuple[GraphRecord, Path]], component: str) -> None:
    graph, folder = full_width(component)
    tokens = {"transformer": "rotary_cos", "vision": "patches", "language": "input_ids"}[component]
    heads = {"transformer": 24, "vision": 16, "language": 28}[component]
    (most,) = (max(p.max[:2]) if component == "language" else p.max[0] for p in graph.profiles if p.input == tokens)
    scores = heads * most**2 * 2
    for name in ("l40s", "a100"):
        engine = RTX.build(graph, folder, key="k", recipe=load_recipe(name))
        assert engine.structure is not None
        found = json.loads((folder / engine.structure.path).read_text())
        assert found["attention"] == {"layers": LAYERS[component], "fused": LAYERS[component]}
        assert found["allocations"] == 0
        assert found["largest_buffer_bytes"] < scores
        if component != "vision":  # whose few patches make less than its feed-forward
            assert engine.activation_bytes is not None
            assert engine.activation_bytes < scores
        assert graph.files[0].bytes < engine.files[0].bytes < 1.1 * graph.files[0].bytes + 1e7
        assert engine.build_peak_bytes < 4e9
        (folder / engine.path).unlink()


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_the_vae_keeps_the_scores_of_one_row(
    full_width: Callable[[str], tuple[GraphRecord, Path]], component: str
) -> None:
    """At its published width, for the largest image that the recipe allows; the scores of all rows were 2.9 GB."""
    graph, folder = full_width(component)
    (dims,) = (p.max for p in graph.profiles)
    scale = {"vae_encoder": 1 / 8, "vae_decoder": 2}[component]
    positions = int(dims[1] * scale) * int(dims[2] * scale)
    for name in ("l40s", "a100"):
        engine = RTX.build(graph, folder, key="k", recipe=load_recipe(name))
        assert engine.structure is not None
        assert engine.activation_bytes is not None
        assert engine.activation_bytes < 2 * positions**2
        (folder / engine.path).unlink()
