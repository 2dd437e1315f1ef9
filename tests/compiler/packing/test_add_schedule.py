"""Schedules that are added to a bundle: from its checkpoint, as the weights would have them, or not at all."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing.add_schedule import add_schedule
from qie.compiler.packing.schedule_plan import plan_schedule
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.synthetic.shards import SyntheticShards
from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import BuildError, CheckpointError, RequestError
from qie.engines.inputs.stored_schedules import stored_schedules
from tests.support.bundles import build
from tests.support.images import smooth_image

TABLES = 'extends = "cpu"\nmodulation = "tables"\n'
INT8 = f"""{TABLES}
[components.transformer]
scheme = "int8-smooth"
[[schedules]]
steps = 4
guidance = 1.0
"""


@pytest.fixture(scope="module")
def tables_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``checkpoint`` with tables alone; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("alone") / "alone", TABLES).path


@pytest.fixture
def copied(tables_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tables_bundle, tmp_path / "copied"))


def edited(bundle: Bundle | Path, steps: int) -> np.ndarray:
    request = Request(images=[smooth_image(64, 64)], instructions=["make it red"], seeds=[1], steps=steps, guidance=1.0)
    with Editor(bundle) as editor:
        return np.asarray(editor.edit(request).images[0])


def content(bundle: Path) -> dict[str, tuple[int, int]]:
    """Size and inode of every file."""
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): (path.stat().st_size, path.stat().st_ino) for path in files}


def test_tables_and_weights_edit_equally(bundle: Path, tables_bundle: Path) -> None:
    with_weights, alone = open_bundle(bundle).manifest, open_bundle(tables_bundle).manifest
    assert not (tables_bundle / "modulation.weights").exists()
    assert alone.model.modulation.file is None
    assert alone.model.modulation.identity == with_weights.model.modulation.identity
    assert np.array_equal(edited(tables_bundle, 4), edited(bundle, 4))


def test_an_added_schedule_is_that_of_the_weights(bundle: Path, copied: Path, checkpoint: Path) -> None:
    before, old = content(copied), open_bundle(copied)
    added = add_schedule(copied, steps=5, model=checkpoint)
    verify(added)
    assert [schedule.steps for schedule in stored_schedules(added.manifest)] == [4, 5, 8, 20]
    assert added.manifest.added[0].sizes == added.manifest.limits.buckets
    after = content(copied)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: stat for name, stat in before.items() if name != "manifest.json"
    }
    difference = edited(added, 5).astype(int) - edited(bundle, 5).astype(int)
    assert np.abs(difference).max() <= 1
    assert np.array_equal(edited(added, 4), edited(bundle, 4))
    assert old.folder.replaced
    assert add_schedule(added, steps=5, model=checkpoint) is added  # it has them


def test_a_size_between_those_of_the_recipe(copied: Path, checkpoint: Path) -> None:
    limits = open_bundle(copied).manifest.limits
    size = (limits.min_side + 16, limits.min_side)
    added = add_schedule(copied, steps=4, sizes=[size], model=checkpoint)
    schedule = stored_schedules(added.manifest)[0]
    assert [(s.width, s.height) for s in schedule.sizes[len(limits.buckets) :]] == [size]


def test_a_bundle_with_weights_needs_no_checkpoint(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "mine"))
    added = add_schedule(mine, steps=5)
    assert 5 in [schedule.steps for schedule in stored_schedules(added.manifest)]
    assert np.abs(edited(added, 5).astype(int) - edited(bundle, 5).astype(int)).max() <= 1


def test_smoothing_is_that_of_the_bundles_calibration(tmp_path: Path) -> None:
    alone = build("pocket", tmp_path / "alone", INT8)
    assert alone.manifest.calibration is not None
    added = add_schedule(alone, steps=2, sizes=[(128, 128)])
    assert added.manifest.model.modulation.identity == alone.manifest.model.modulation.identity
    assert len(added.manifest.schedules) == len(alone.manifest.schedules) + 1


def test_the_loras_are_those_of_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    layer, rng = "transformer_blocks.1.img_mod.1", np.random.default_rng(0)
    out, inner = open_checkpoint(str(checkpoint)).reader("transformer").shape(f"{layer}.weight")
    file = tmp_path / "style.safetensors"
    values = {"A": rng.standard_normal((4, inner)), "B": rng.standard_normal((out, 4))}
    save_file({f"{layer}.lora_{key}.weight": value.astype(np.float32) / 8 for key, value in values.items()}, file)
    made = build(checkpoint, tmp_path / "made", TABLES, loras=[file])
    for loras in ([], [(file, 0.5)]):
        with pytest.raises(CheckpointError, match=r"the LoRAs are not those of made, which has style\.safetensors:1;"):
            add_schedule(made, steps=2, model=checkpoint, loras=loras)
    added = add_schedule(made, steps=2, model=checkpoint, loras=[file])
    assert [schedule.steps for schedule in stored_schedules(added.manifest)] == [2, 4, 8, 20]


def test_shards_that_are_made_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the transformer, each once, and give the tables of a folder that has them."""
    whole, on_demand = (
        synthesize(plan_synthesis("tiny", tmp_path / name / "tiny", shard_bytes=300_000, on_demand=name == "demand"))
        for name in ("whole", "demand")
    )
    alone = build(whole, tmp_path / "alone", TABLES).path
    copy = shutil.copytree(alone, tmp_path / "copy")
    fetched: list[str] = []
    fetch = SyntheticShards.fetch

    def noted(self: SyntheticShards, path: str, *arguments: Any, **options: Any) -> None:
        fetched.append(path)
        fetch(self, path, *arguments, **options)

    monkeypatch.setattr(SyntheticShards, "fetch", noted)
    planned = plan_schedule(open_bundle(copy), steps=5, model=on_demand)
    assert planned.disk_bytes - planned.table_bytes < 310_000 < planned.fetch_bytes
    shards, total_bytes = planned.shards, planned.fetch_bytes
    del planned  # it holds the bundle that is replaced
    reports: list[tuple[int, int]] = []

    def report(what: str, done: int, total: int) -> None:
        if what == "fetch":
            reports.append((done, total))

    added = add_schedule(copy, steps=5, model=on_demand, progress=report)
    assert fetched == list(shards)
    assert {total for _, total in reports} == {total_bytes}
    assert added.manifest.schedules == add_schedule(alone, steps=5, model=whole).manifest.schedules
    verify(added)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "copy", "demand", "mine.toml", "whole"]


def test_a_bundle_that_was_replaced_meanwhile_stays(copied: Path, checkpoint: Path) -> None:
    replaced: list[Bundle] = []

    def replace(what: str, done: int, total: int) -> None:
        if what == "modulation" and done == total:
            replaced.append(add_schedule(copied, steps=6, model=checkpoint))

    with pytest.raises(BuildError, match="copied was changed meanwhile; start again"):
        add_schedule(copied, steps=5, model=checkpoint, progress=replace)
    assert open_bundle(copied).manifest == replaced[0].manifest


def test_another_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    before = content(copied)
    other = write_checkpoint(tmp_path / "other", ARCHITECTURES["tiny"], seed=2)
    with pytest.raises(CheckpointError, match="is not the one that .* was built from; name that of tiny"):
        add_schedule(copied, steps=5, model=other)
    with pytest.raises(CheckpointError, match="has another transformer than"):
        add_schedule(copied, steps=5, model="pocket")
    with pytest.raises(BuildError, match="its checkpoint tiny is no hub id; name its folder"):
        add_schedule(copied, steps=5)
    assert content(copied) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("steps", "sizes", "sentence"), [
    (0, None, "the number of steps is 0, expected from 1 to 1000"),
    (1001, None, "the number of steps is 1001, expected from 1 to 1000"),
    (5, [(65, 64)], "the bundle does not edit at 65x64"),
])  # fmt: skip
def test_what_the_bundle_cannot_edit(
    tables_bundle: Path, steps: int, sizes: list[tuple[int, int]] | None, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        add_schedule(tables_bundle, steps=steps, sizes=sizes)


def test_a_stop_in_the_middle_leaves_the_old_bundle(copied: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = content(copied)
    seen: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(done)
        if what == "modulation" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_schedule(copied, steps=5, model=checkpoint, progress=stop)
    assert len(seen) > 3
    assert content(copied) == before
    verify(open_bundle(copied))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


KILLED = """
import os, signal, sys
from qie import add_schedule
def stop(what, done, total):
    if what == "modulation" and 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)
add_schedule(sys.argv[1], steps=5, model=sys.argv[2], progress=stop)
"""


def test_a_kill_in_the_middle_leaves_the_old_bundle(copied: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = content(copied)
    killed = subprocess.run([sys.executable, "-c", KILLED, copied, checkpoint], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert content(copied) == before
    verify(open_bundle(copied))
    assert 5 in [
        schedule.steps for schedule in stored_schedules(add_schedule(copied, steps=5, model=checkpoint).manifest)
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command(
    qie: Callable[..., CompletedProcess[str]], workplace: Path, copied: Path, checkpoint: Path
) -> None:
    asked = ("run", "photo.png", "make it red", "--bundle", copied, "--cfg", "1", "--steps", "5")
    refused = qie(*asked)
    assert refused.returncode == 2
    assert "choose one of these, or add them with `qie add-schedule` (--steps)" in refused.stderr
    size = content(copied)
    planned = qie("add-schedule", copied, "--steps", "5", "--model", checkpoint, "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "tables of 5 steps, for " in planned.stdout and "computed from tiny, in " in planned.stdout
    assert content(copied) == size
    done = qie("add-schedule", copied, "--steps", "5", "--model", checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    assert "it edits with 4 steps at" in done.stdout
    assert qie(*asked).returncode == 0
    assert "has these tables already" in qie("add-schedule", copied, "--steps", "5", "--model", checkpoint).stdout
    assert "4, 5, 8, 20 steps at" in qie("inspect", copied).stdout
