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
from qie.engines import gpus as gpus_module
from qie.engines.bundle.manifest import COMPONENTS, FileRecord, ProfileRecord
from qie.engines.errors import BackendMissingError, BuildError, QieError
from qie.engines.gpus import NO_GPU, find_driver
from tests.support.bundles import planned
from tests.support.libcuda import Libcuda, StandIn, made_up_uuid
from tests.support.small_graphs import SHAPES, Worker, linear, needs_rtx, record, small

RTX = BUILDERS["tensorrt-rtx"]


@needs_rtx
def test_what_decides_an_engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(checkpoint, tmp_path, small("l40s"))
    graphs, recipe = graph_keys(plan, "digest"), plan.recipe
    assert len(set(graphs.values())) == len(COMPONENTS)
    assert all(graphs[c] != other for c, other in graph_keys(plan, "another digest").items())
    (graph,) = graphs["transformer"]
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
        engine_key(graphs["vision"][0], "tensorrt-rtx", recipe, shapes),
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
    needs = "tensorrt builds only for a local GPU, the recipe is for compute capability 8.0, and "
    assert tensorrt.unavailable(a100) == f"{needs}{NO_GPU}"
    gpus("8.9", "8.6")
    found = "this machine has GPU 8.9 (8.9), GPU 8.6 (8.6); build on a machine with such a GPU"
    assert tensorrt.unavailable(a100) == f"{needs}{found}"
    gpus("8.9", "8.0")
    assert tensorrt.unavailable(a100) is None
    assert tensorrt.unavailable(a100, 1) is None
    assert tensorrt.unavailable(a100, 0) == f"{needs}GPU 0 is GPU 8.9 (8.9); choose GPU 1"
    assert RTX.unavailable(a100, 7) is None  # it builds on none


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


GPUS = [
    StandIn(name=f"GPU {capability}", capability=capability, pci=f"0000:0{9 - index}:00.0", uuid=made_up_uuid(index))
    for index, capability in enumerate(["9.0", "8.9", "8.0", "8.0"])
]


@pytest.mark.parametrize(
    ("visible", "order", "device", "expected"),
    [
        (None, None, None, 2),
        (None, None, 3, 3),
        (None, "PCI_BUS_ID", None, 3),
        ("1,2,3", None, None, 2),
        ("3,2", None, None, 3),
        ("3,2", None, 1, 2),
        ("2", "PCI_BUS_ID", None, None),
        (f"{made_up_uuid(1)},3,{made_up_uuid(2)}", None, None, 3),
        (f"{made_up_uuid(1)},3,{made_up_uuid(2)}", None, 2, 2),
    ],
)
def test_the_worker_sees_the_gpu_that_was_chosen_and_no_other(
    set_facts: Callable[..., None],
    tmp_path: Path,
    qie_home: Path,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    order: str | None,
    device: int | None,
    expected: int | None,
) -> None:
    """Whatever the environment hides and however it orders; the timing cache is that of the GPU."""
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    driver = Libcuda(GPUS)
    monkeypatch.setattr(gpus_module, "libcuda", lambda: driver)
    seen = tmp_path / "seen"
    worker(
        f"job = json.load(sys.stdin); Path({str(seen)!r}).write_text(json.dumps([job['timing_cache'], "
        "os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('CUDA_DEVICE_ORDER')])); tell(failed=['stopped'])"
    )
    set_facts("tensorrt", build_module="onnx")  # any package with a version: the worker is scripted
    builder, graph = BUILDERS["tensorrt"], record(tmp_path, linear(), **SHAPES)
    if expected is None:
        assert "this machine has GPU 8.9 (8.9)" in str(builder.unavailable(small("a100"), device))
        return
    assert builder.unavailable(small("a100"), device) is None
    with pytest.raises(BuildError, match="stopped"):
        builder.build(graph, tmp_path, key="k", recipe=small("a100"), device=device)
    cache, visible_there, order_there = json.loads(seen.read_text())
    assert cache == str(qie_home / "timing" / f"gpu-8-0-{onnx.__version__}.cache")
    assert order_there == order
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible_there)
    driver = Libcuda(GPUS)
    assert [gpu.pci for gpu in find_driver().gpus] == [GPUS[expected].pci]


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
