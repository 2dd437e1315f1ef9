"""The builder of both TensorRTs: what decides an engine, where it builds, and the job of its worker."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.planning.checks import check_buildable
from qie.compiler.planning.keys import engine_key, graph_keys
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import COMPONENTS, FileRecord, ProfileRecord
from qie.engines.errors import BackendMissingError, BuildError, QieError
from tests.support.bundles import planned
from tests.support.small_graphs import SHAPES, Worker, linear, needs_rtx, record, small

RTX = BUILDERS["tensorrt-rtx"]


@needs_rtx
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
        patch.setattr("tensorrt_rtx.__version__", "99.0")
        assert key() not in keys
    assert key() == keys[0]


@needs_rtx
def test_a_builder_says_why_it_cannot_build(gpus: Callable[..., None], set_facts: Callable[..., None]) -> None:
    a100 = load_recipe("a100")
    assert RTX.unavailable(a100) is None
    assert re.search(r"does not compile for compute capability 9\.0", str(RTX.unavailable(load_recipe("h100"))))
    tensorrt = BUILDERS["tensorrt"]
    set_facts("tensorrt", build_module="no_such_tensorrt", build_install="pip install x")
    assert tensorrt.unavailable(a100) == "tensorrt is not installed; run `pip install x`"
    set_facts("tensorrt", build_module="tensorrt_rtx")
    gpus()
    assert re.search(r"none with compute capability 8\.0 \(it has no GPU\); build on", str(tensorrt.unavailable(a100)))
    gpus("8.9", "8.6")
    assert re.search(r"its GPUs have 8\.9, 8\.6", str(tensorrt.unavailable(a100)))
    gpus("8.9", "8.0")
    assert tensorrt.unavailable(a100) is None


@needs_rtx
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
    """It could be installed here, so nothing is left to finish on another machine."""
    set_facts("tensorrt-rtx", build_module="no_such_rtx")
    plan = planned(checkpoint, tmp_path / "out", small("l40s"))
    assert {(part.backend, part.finish) for part in plan.components} == {(None, None)}
    with pytest.raises(
        BackendMissingError,
        match=r"tensorrt-rtx is not installed, run `pip install 'qie\[compile\]'`, and tensorrt is not",
    ):
        check_buildable(plan)


def test_the_timing_cache_is_that_of_the_gpu(
    gpus: Callable[..., None], set_facts: Callable[..., None], tmp_path: Path, qie_home: Path, worker: Worker
) -> None:
    """And the worker sees only the GPU of the recipe."""
    gpus("8.9", "8.0")
    seen = tmp_path / "seen"
    worker(
        f"job = json.load(sys.stdin); Path({str(seen)!r}).write_text(json.dumps([job['timing_cache'], "
        "os.environ.get('CUDA_VISIBLE_DEVICES')])); tell(failed=['stopped'])"
    )
    set_facts("tensorrt", build_module="onnx")  # any package with a version: the worker is scripted
    with pytest.raises(BuildError, match="stopped"):
        BUILDERS["tensorrt"].build(record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=small("a100"))
    assert json.loads(seen.read_text()) == [str(qie_home / "timing" / f"gpu-8-0-{onnx.__version__}.cache"), "1"]


def test_weights_that_exceed_gpu_memory_may_be_streamed(tmp_path: Path, worker: Worker) -> None:
    graph = record(tmp_path, linear(), **SHAPES)
    seen = tmp_path / "seen"
    worker(f"Path({str(seen)!r}).write_text(sys.stdin.read()); tell(failed=['stopped'])")
    for gib, expected in ((17, False), (19, True)):
        weights = FileRecord(path="transformer.weights", bytes=gib * 2**30, sha256="0" * 64)
        with pytest.raises(QieError):
            RTX.build(
                replace(graph, files=(*graph.files, weights)),
                tmp_path,
                key="k",
                recipe=replace(small("l40s"), memory_gib=24),
            )
        assert json.loads(seen.read_text())["weight_streaming"] is expected


@needs_rtx
def test_an_engine_that_streams_weights_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT refuses to combine weight streaming with memory that the caller allocates."""
    engines = []
    for share in (0.75, -1.0):  # of memory, so that no weights are too many
        monkeypatch.setattr("qie.compiler.backends.tensorrt.builder.STREAMED_SHARE", share)
        engine = RTX.build(record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=small("l40s"))
        engines.append((tmp_path / engine.path).read_bytes())
    plain, streaming = map(len, engines)
    assert streaming > plain
