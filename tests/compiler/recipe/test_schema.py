"""The schema: digests, sizes and limits, compute capabilities, and the text of a resolved recipe."""

import dataclasses
import re
from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe, parse_recipe, recipe_names
from qie.compiler.recipe.schema import Schedule, supports_fp8, to_toml
from qie.engines.bundle.specs import Size
from qie.engines.errors import RecipeError
from tests.support.recipes import GPU, write

MODEL_AREA = 1024 * 1024


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", False), ("8.0", False), ("8.8", False), ("8.9", True), ("8.10", True), ("9.0", True), ("12.0", True)],
)
def test_compute_capabilities_are_compared_number_by_number(capability: str, expected: bool) -> None:
    assert supports_fp8(capability) is expected


@pytest.mark.parametrize("name", recipe_names())
def test_the_text_of_a_recipe_is_that_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(to_toml(recipe), Path("manifest.json")) == recipe


def test_a_text_is_parsed_beside_its_file(tmp_path: Path) -> None:
    text = 'extends = "cpu"\ncalibration = "c.npz"\n'
    recipe = parse_recipe(text, tmp_path / "mine.toml")
    assert recipe == dataclasses.replace(load_recipe("cpu"), calibration=str(tmp_path / "c.npz"))
    with pytest.raises(RecipeError, match=r"mine\.toml is not valid TOML \(.*\); correct it$"):
        parse_recipe("gpu = ", tmp_path / "mine.toml")


def test_strings_survive_writing(tmp_path: Path) -> None:
    exclude = ('quote " and \\', "tab\tnewline\n", "del\x7f nul\x00", "ünï 🐈")
    recipe = load_recipe(write(tmp_path, GPU))
    components = dataclasses.replace(
        recipe.components, transformer=dataclasses.replace(recipe.components.transformer, exclude=exclude)
    )
    recipe = dataclasses.replace(
        recipe, components=components, schedules=(Schedule(steps=3, guidance=1.1, sizes=("1:1", "16:9")),)
    )
    assert load_recipe(write(tmp_path, to_toml(recipe))) == recipe


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    recipe = load_recipe("l40s")
    assert re.fullmatch("[0-9a-f]{64}", recipe.digest())
    assert load_recipe(write(tmp_path, '# a remark\nextends = "l40s"')).digest() == recipe.digest()
    changed = load_recipe(write(tmp_path, 'extends = "l40s"\n[limits]\nhost_memory_gib = 65'))
    assert changed.digest() != recipe.digest()
    assert len({load_recipe(name).digest() for name in recipe_names()}) == len(recipe_names())


def test_a_recipe_is_hashable_and_frozen() -> None:
    recipe = load_recipe("cpu")
    assert {recipe: 1}[load_recipe("cpu")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.gpu = "other"  # type: ignore[misc]


def test_buckets_follow_the_area_and_are_unique(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GPU + '[shapes]\naspect_ratios = ["1:1", "2:2", "16:9", "9:16"]'))
    assert recipe.buckets(MODEL_AREA) == (
        Size(width=1024, height=1024),
        Size(width=1376, height=768),
        Size(width=768, height=1376),
    )
    assert recipe.buckets(256 * 256)[1] == Size(width=352, height=192)


def test_schedule_sizes(tmp_path: Path) -> None:
    text = GPU + "[[schedules]]\nsteps = 4\nguidance = 1\nsizes = ['16:9', '1:1']"
    recipe = load_recipe(write(tmp_path, text))
    wide_and_square = (Size(width=1376, height=768), Size(width=1024, height=1024))
    assert recipe.schedule_sizes(recipe.schedules[0], MODEL_AREA) == wide_and_square
    everywhere = Schedule(steps=4, guidance=1.0)
    assert recipe.schedule_sizes(everywhere, MODEL_AREA) == recipe.buckets(MODEL_AREA)


@pytest.mark.parametrize(
    ("scale", "max_side", "max_area"), [(1.0, 1568, 1184 * 896), (1.5, 1920, 1572864), (4.0, 3136, 4 * MODEL_AREA)]
)
def test_shape_limits(tmp_path: Path, scale: float, max_side: int, max_area: int) -> None:
    limits = load_recipe(write(tmp_path, GPU + f"[shapes]\narea_scale_max = {scale}")).shape_limits(MODEL_AREA)
    assert (limits.max_side, limits.max_area, limits.min_side) == (max_side, max_area, 128)
    assert (limits.batch_max, limits.references_max, limits.prompt_tokens_max) == (4, 3, 2560)


def test_the_buckets_of_a_small_model_are_always_taken() -> None:
    recipe = load_recipe("l40s")
    limits = recipe.shape_limits(128 * 128)
    assert limits.min_side == 96 < recipe.shapes.min_side == 128
    assert Size(width=160, height=96) in limits.buckets
