"""Engines for onnxruntime: for a CPU they are loaded once, for a GPU they have profiles."""

from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.packing import build as packing
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.load import load_recipe
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import BuildError
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
