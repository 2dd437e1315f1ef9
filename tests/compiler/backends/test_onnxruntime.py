"""Engines for onnxruntime: for a CPU they are loaded once, for a GPU they have profiles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.backends import onnxruntime as module
from qie.compiler.packing import build as packing
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.load import load_recipe
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import BuildError
from qie.engines.gpus import Gpu
from qie.engines.machine import this_machine
from tests.support.bundles import planned
from tests.support.small_graphs import SHAPES, linear, record, small


def test_engines_for_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path / "out", replace(small("l40s"), backends=("onnxruntime",)))
    bundle = packing.build(plan)
    assert [engine.component for engine in bundle.manifest.engines] == list(COMPONENTS)
    for engine, part in zip(bundle.manifest.engines, plan.components, strict=True):
        assert (engine.backend, engine.compute_capability) == ("onnxruntime", "8.9")
        assert engine.profiles == profiles(part.graph, plan.recipe, plan.model)
        assert [file.path for file in engine.files] == [f"{engine.component}.onnx", f"{engine.component}.weights"]


def test_bfloat16_on_a_cpu_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"onnxruntime .* does not load transformer\.onnx \(.*MatMul.*\); set the"):
        BUILDERS["onnxruntime"].build(
            record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=load_recipe("cpu")
        )


A100 = Gpu(index=0, name="NVIDIA A100", compute_capability="8.0", memory_gib=80.0)
L40S = Gpu(index=1, name="NVIDIA L40S", compute_capability="8.9", memory_gib=45.0)


@pytest.mark.parametrize(
    ("serves", "gpus", "loads"),
    [(True, (A100, L40S), True), (False, (L40S,), False), (True, (A100,), False), (True, (), False)],
    ids=["GPU", "onnxruntime for a CPU", "another GPU", "no GPU"],
)
def test_a_graph_for_a_gpu_is_loaded_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serves: bool, gpus: tuple[Gpu, ...], loads: bool
) -> None:
    machine, asked = replace(this_machine(), gpus=gpus), []
    monkeypatch.setattr(module, "serves_gpu", lambda: serves)
    monkeypatch.setattr(module, "this_machine", lambda: machine)
    monkeypatch.setattr(module, "preload_cuda", lambda: asked.append("libraries"))

    def session(path: str, options: Any, providers: list[Any], enable_fallback: int) -> None:
        assert not enable_fallback
        asked.extend(providers)

    monkeypatch.setattr(module.ort, "InferenceSession", session)
    engine = module.build(record(tmp_path, linear(), **SHAPES), tmp_path, key="k", recipe=small("l40s"))
    assert engine.compute_capability == "8.9"
    assert asked == (["libraries", ("CUDAExecutionProvider", {"device_id": "1"})] if loads else [])
