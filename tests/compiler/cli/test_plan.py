"""`qie plan`: its tables, its JSON and its refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.workload import workload
from tests.support.bundles import planned

Qie = Callable[..., CompletedProcess[str]]


def test_plan_prints_four_tables(qie: Qie, checkpoint: Path) -> None:
    done = qie("plan", checkpoint, "--size", "64x96", "--references", "2", "--steps", "3", "--cfg", "1")
    assert done.returncode == 0, done.stderr
    assert "One run of each component: 64x96, 2 images\n" in done.stdout
    assert "The whole edit: 3 steps, no guidance\n" in done.stdout
    assert re.search(r"\ndisk while building: [\d.]+ MB, with --stream one shard of the checkpoint more\n", done.stdout)
    for component in ("vision", "language", "vae_encoder", "transformer", "vae_decoder"):
        assert done.stdout.count(f"\n{component} ") == 4
    assert "not known" in done.stdout


def test_plan_as_json_is_the_estimate(qie: Qie, checkpoint: Path, tmp_path: Path) -> None:
    answer = json.loads(qie("plan", checkpoint, "--steps", "3", "--json").stdout)
    plan = planned(checkpoint, tmp_path / "bundle", weights=False, memory_gib=64)
    found = estimate(plan, workload(plan, steps=3))
    assert answer["edit"]["steps"] == 3
    assert answer["gpu_bytes"] == found.gpu_bytes
    assert answer["seconds_at_peak"] == found.seconds
    assert [c["cost"]["moved_bytes"] for c in answer["components"]] == [c.cost.moved_bytes for c in found.components]
    assert answer["refusal"] is None


def test_plan_refuses_after_it_has_shown_why(
    qie: Qie, refusal: Callable[[CompletedProcess[str]], str], checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'extends = "cpu"\nmemory_gib = 0.25\n[limits]\nbuild_workspace_gib = 0.25\n'
        "[shapes]\nbatch = { max = 64 }\n[components.transformer]\n"
    )
    done = qie("plan", checkpoint, "--gpu", recipe)
    assert "GEMM" in done.stdout
    assert "does not fit in the memory of the CPU" in refusal(done)
    answer = json.loads(qie("plan", checkpoint, "--gpu", recipe, "--json").stdout)
    assert "does not fit in the memory of the CPU" in answer["refusal"]


@pytest.mark.parametrize("size", ["1024", "0x10", "axb"])
def test_plan_refuses_a_size_that_is_none(
    qie: Qie, refusal: Callable[[CompletedProcess[str]], str], checkpoint: Path, size: str
) -> None:
    assert "size" in refusal(qie("plan", checkpoint, "--size", size))
