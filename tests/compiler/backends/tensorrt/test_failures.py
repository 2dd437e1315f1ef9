"""Every failure of a build names its cause, and memory where memory ran out."""

import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qie.compiler.backends import BUILDERS
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import ProfileRecord
from qie.engines.errors import BuildError
from tests.support.bundles import build
from tests.support.small_graphs import SHAPES, Worker, linear, model_of, needs_rtx, record, small

RTX = BUILDERS["tensorrt-rtx"]


@needs_rtx
def test_a_graph_made_by_hand(tmp_path: Path) -> None:
    engine = RTX.build(record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=small("l40s"))
    assert engine.path == "transformer.tensorrt-rtx-8.9.engine"
    assert (tmp_path / engine.path).stat().st_size == engine.files[0].bytes > 64 * 64 * 2
    assert engine.profiles == (ProfileRecord(input="x", min=(1, 64), opt=(256, 64), max=(256, 64)),)


@needs_rtx
def test_a_graph_that_the_parser_does_not_take(tmp_path: Path) -> None:
    expected = (
        r"tensorrt-rtx \S+ rejects the graph of transformer \(NoSuchOperator product: .*Plugin not found.*\); set"
    )
    with pytest.raises(BuildError, match=expected):
        RTX.build(record(tmp_path, linear("NoSuchOperator"), **SHAPES), tmp_path, key="k", recipe=small("l40s"))
    assert list(tmp_path.glob("*.engine")) == []


@needs_rtx
def test_a_graph_that_the_compiler_does_not_take(tmp_path: Path) -> None:
    """Attention with one head of 384 has no kernel."""
    q, k, v = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, "n", 384]) for name in "qkv")
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=1, kv_num_heads=1)
    graph = record(tmp_path, model_of([node], [], q, k, v), **dict.fromkeys("qkv", ((1, 16, 384), (1, 256, 384))))
    with pytest.raises(BuildError, match=r"built no engine of transformer \(.*Attention operation was not supported"):
        RTX.build(graph, tmp_path, key="k", recipe=small("l40s"))


@needs_rtx
def test_activations_beyond_the_workspace_are_memory(tmp_path: Path) -> None:
    """Inside a loop the compiler cannot defer allocations to run time, so it fails."""
    inner = [
        helper.make_node("Identity", ["go_on"], ["go_on_out"]),
        helper.make_node("Gather", ["x", "i"], ["row"], axis=0),
        helper.make_node("MatMul", ["row", "x2"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "values"], ["row_out"]),
    ]
    body = helper.make_graph(
        inner,
        "rows",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("row_out", TensorProto.BFLOAT16, ["n", 64]),
        ],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["dims"], start=0, end=1),
        helper.make_node("Squeeze", ["dims"], ["count"]),
        helper.make_node("Loop", ["count", "true"], ["y"], body=body),
    ]
    true = numpy_helper.from_array(np.array(True), "true")
    x, x2, values = (
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, dims)
        for name, dims in (("x", ["b", "n", 64]), ("x2", [64, "m"]), ("values", ["m", 64]))
    )
    graph = record(
        tmp_path,
        model_of(nodes, [true], x, x2, values),
        x=((1, 16, 64), (4, 40000, 64)),
        x2=((64, 16), (64, 40000)),
        values=((16, 64), (40000, 64)),
    )
    recipe = replace(small("l40s"), limits=replace(small("l40s").limits, build_workspace_gib=0.5))
    assert_names_memory(lambda: RTX.build(graph, tmp_path, key="k", recipe=recipe), "OutOfMemory", "0.5")


def assert_names_memory(build: Callable[[], object], what: str, workspace: str = "2") -> None:
    with pytest.raises(BuildError) as raised:
        build()
    message = str(raised.value)
    assert re.search(rf"memory ran out while tensorrt-rtx compiled transformer \(.*{what}", message), message
    assert f"limits.build_workspace_gib = {workspace}; build on a machine with more memory or in more parts" in message
    assert "the recipe for L40S" in message


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("json.load(sys.stdin); tell(progress=3); kill()", "the system killed the process"),
        ("kill()", "the system killed the process"),
        ("print('{\"done\": {', end='', flush=True); kill()", "the system killed the process"),
        ("print(\"terminate called after throwing 'std::bad_alloc'\", file=sys.stderr); os.abort()", "bad_alloc"),
        ("tell(failed=['Error Code 10: Could not find any implementation for node x.'])", "Could not find any impl"),
        ("tell(failed=['[resizingAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)'])", "out of memory"),
    ],
    ids=["killed", "killed at once", "killed while it wrote", "bad_alloc", "no implementation", "CUDA"],
)  # fmt: skip
def test_memory_is_named(tmp_path: Path, worker: Worker, script: str, what: str) -> None:
    graph = record(tmp_path, linear(), **SHAPES)
    worker(script)
    assert_names_memory(lambda: RTX.build(graph, tmp_path, key="k", recipe=small("l40s")), what)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sys.exit(3)", "it ended with code 3 without a message"),
        ("sys.exit('Traceback\\nImportError: libcudart')", "Traceback, ImportError: libcudart"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "it ended by SIGSEGV without a message"),
        ("tell(failed=['first', 'second'])", "first, second"),
    ],
)
def test_any_other_failure_is_reported(tmp_path: Path, worker: Worker, script: str, reason: str) -> None:
    graph = record(tmp_path, linear(), **SHAPES)
    worker(script)
    with pytest.raises(
        BuildError, match=rf"tensorrt-rtx \S+ built no engine of transformer \({re.escape(reason)}\); set another"
    ):
        RTX.build(graph, tmp_path, key="k", recipe=small("l40s"))


@needs_rtx
def test_a_full_disk(tmp_path: Path) -> None:
    """Really full, for files larger than half an engine."""
    graph = record(tmp_path, linear(), **SHAPES)
    size = RTX.build(graph, tmp_path, key="k", recipe=small("l40s")).files[0].bytes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(
            BuildError, match=r"transformer\S+engine cannot be written \(File too large\); free some space"
        ):
            RTX.build(graph, tmp_path, key="k", recipe=small("l40s"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@needs_rtx
def test_a_failed_build_leaves_the_earlier_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path, worker: Worker
) -> None:
    path = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    worker("json.load(sys.stdin); sys.exit('broken')")
    with pytest.raises(BuildError, match="built no engine of (vision|language)"):
        build(checkpoint, path, small("l40s"))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["bundle"]
    assert open_bundle(str(path)).manifest.engines[0].backend == "onnxruntime"


def test_stopping_a_build_stops_its_process(tmp_path: Path, worker: Worker) -> None:
    graph = record(tmp_path, linear(), **SHAPES)
    pid = tmp_path / "pid"
    worker(f"Path({str(pid)!r}).write_text(str(os.getpid())); tell(progress=1); import time; time.sleep(600)")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RTX.build(graph, tmp_path, key="k", recipe=small("l40s"), progress=stop)
    assert not Path("/proc", pid.read_text()).exists()
