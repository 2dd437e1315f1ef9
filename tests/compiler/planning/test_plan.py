"""Plans: sizes that come true, names, and what is refused before anything is written."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.planning.checks import check_buildable, check_calibrated
from qie.compiler.planning.plan import Plan, recipe_schedules
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import open_bundle
from qie.engines.errors import BackendMissingError, BuildError, CalibrationError, CheckpointError
from tests.support.bundles import planned

Make = Callable[..., Plan]


@pytest.fixture
def make(checkpoint: Path, tmp_path: Path) -> Make:
    """A plan for the tiny checkpoint by a recipe's name or text."""

    def make(recipe: str = "cpu", *, source: Path = checkpoint) -> Plan:
        return planned(source, tmp_path / "out", recipe)

    return make


# What is planned


def test_the_plan_is_what_the_build_makes(make: Make, bundle: Path) -> None:
    """To within graphs and tokenizer, the two that are not counted."""
    plan = make()
    manifest = open_bundle(str(bundle)).manifest
    for part, engine in zip(plan.components, manifest.engines, strict=True):
        weights = next(record for record in engine.files if record.path.endswith(".weights"))
        assert (part.component, part.backend, part.precision) == (engine.component, engine.backend, engine.precision)
        assert part.parameters == engine.parameters
        assert part.bytes == weights.bytes
    assert plan.modulation_bytes == manifest.model.modulation.file.bytes
    headers = 128 * len(manifest.schedules)  # of the npy files
    assert plan.tables_bytes + headers == sum(record.bytes for record in manifest.schedules)
    counted = sum(c.bytes for c in plan.components) + plan.modulation_bytes + plan.tables_bytes
    assert plan.bytes == counted


def test_a_plan_reads_no_weights(tmp_path: Path, make: Make) -> None:
    """Without them it takes for granted that they are bfloat16, as those of the published models."""
    bare = write_checkpoint(tmp_path / "bare", ARCHITECTURES["tiny"], weights=False)
    plan = planned(bare, tmp_path / "bundle", weights=False)
    assert [part.bytes for part in plan.components] == [part.bytes for part in make().components]
    narrow = write_checkpoint(tmp_path / "narrow", ARCHITECTURES["tiny"], dtype="bfloat16")
    assert plan.bytes == make(source=narrow).bytes < make().bytes


def test_sizes_follow_the_precision(make: Make) -> None:
    wide, narrow = make(), make('extends = "a100"\nbackends = ["tensorrt-rtx"]\n[shapes]\nmin_side = 32\n')
    for one, other in zip(wide.components, narrow.components, strict=True):
        assert one.parameters == other.parameters
        assert 1.7 < one.bytes / other.bytes < 2.1
    assert narrow.modulation_bytes == 0  # a recipe for a GPU has tables alone
    assert wide.tables_bytes / wide.table_steps == 2 * narrow.tables_bytes / narrow.table_steps


def test_schedules_that_are_equal_are_planned_once(make: Make) -> None:
    """Sizes of one area, and schedules that differ in guidance alone, share their tables."""
    plan = make()
    schedules = recipe_schedules(plan.model, plan.recipe)
    keys = {values.tobytes() for values in schedules}
    assert len(keys) == len(schedules)
    areas = {size.area for size in plan.recipe.buckets(128 * 128)}
    assert len(areas) < len(plan.recipe.buckets(128 * 128))
    assert len(schedules) == len(areas) * len(plan.recipe.schedules)
    assert plan.table_steps == len(areas) * (20 + 8 + 4)
    twice = "[[schedules]]\nsteps = 8\nguidance = 1.0\n[[schedules]]\nsteps = 8\nguidance = 4.0\n"
    assert make(f'extends = "cpu"\n{twice}').table_steps == len(areas) * 8
    one_size = '[[schedules]]\nsteps = 8\nguidance = 1.0\nsizes = ["1:1"]\n'
    assert make(f'extends = "cpu"\n{one_size}').table_steps == 8


# Refused


def test_what_can_be_built_is_not_refused(make: Make) -> None:
    check_buildable(make())


def test_no_builder(make: Make) -> None:
    plan = make('extends = "a100"\nbackends = ["tensorrt-rtx"]\n[shapes]\nmin_side = 32\n')
    nobody = tuple(replace(part, backend=None) for part in plan.components)
    with pytest.raises(BackendMissingError, match="builds vision for tensorrt-rtx.*use the recipe cpu"):
        check_buildable(replace(plan, components=nobody))


def test_quantization(make: Make) -> None:
    plan = make('extends = "cpu"\ncompute_capability = "8.9"\n[components.transformer]\nscheme = "fp8"\n')
    with pytest.raises(
        CalibrationError, match=r'quantizes transformer \("fp8"\), which needs a calibration of this mod'
    ):
        check_calibrated(plan)


def test_parts_of_different_models(make: Make) -> None:
    plan = make()
    other = replace(plan.model, image_token_id=1)
    with pytest.raises(CheckpointError, match="take both from the same checkpoint"):
        check_buildable(replace(plan, checkpoint=replace(plan.checkpoint, model=other)))


def test_destinations(make: Make, bundle: Path, tmp_path: Path) -> None:
    plan = make()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("three years of work")
    for good in (tmp_path / "new" / "deep", tmp_path / "empty", bundle):
        check_buildable(replace(plan, destination=good))
    for bad in (tmp_path / "full", tmp_path / "full" / "thesis.txt", tmp_path):
        with pytest.raises(BuildError, match="exists and is not a qie bundle; choose another folder or delete"):
            check_buildable(replace(plan, destination=bad))


def test_room(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, real, asked = make(), shutil.disk_usage, []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return real(path)._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    needed = rf"needs [\d,]+ bytes, {tmp_path} has 1,000 free; free some space or choose a folder"
    with pytest.raises(BuildError, match=needed):
        check_buildable(replace(plan, destination=tmp_path / "a" / "b"))
    assert asked == [tmp_path]
