"""The recipes that qie ships, and the table of keys in their README."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from qie.compiler.recipe.load import load_recipe, recipe_names
from qie.compiler.recipe.schema import ComponentRecipe, Components, Range, Recipe, to_toml
from qie.compiler.recipe.toml import OneOf, inline
from qie.engines.inputs.sizes import fits
from tests.support.repository import ROOT

README = ROOT / "recipes" / "README.md"
NAMES = (
    "a100", "a100-40gb", "a100-int8", "a100-trtllm", "cpu", "h100", "l4", "l40s", "l40s-trtllm", "l40s-vllm",
    "rtx4090", "rtx5090",
)  # fmt: skip
CAPABILITIES = {
    "a100": "8.0",
    "a100-40gb": "8.0",
    "a100-int8": "8.0",
    "a100-trtllm": "8.0",
    "cpu": None,
    "h100": "9.0",
    "l4": "8.9",
    "l40s": "8.9",
    "l40s-trtllm": "8.9",
    "l40s-vllm": "8.9",
    "rtx4090": "8.9",
    "rtx5090": "12.0",
}
MODEL_AREA = 1024 * 1024


def schema_keys(table: Any = Recipe, prefix: str = "") -> dict[str, str]:
    """Every key of the schema with its default as README writes it."""
    keys: dict[str, str] = {}
    kinds = get_type_hints(table)
    for entry in dataclasses.fields(table):
        kind, key = kinds[entry.name], prefix + entry.name
        items = [item for item in get_args(kind) if dataclasses.is_dataclass(item)]
        if kind is Components:
            keys |= schema_keys(ComponentRecipe, f"{key}.NAME.")
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind is not Range:
            keys |= schema_keys(kind, key + ".")
        elif items:
            keys |= schema_keys(items[0], f"{key}[].")
        elif entry.default is dataclasses.MISSING:
            keys[key] = "required"
        else:
            keys[key] = "nothing" if entry.default is None else f"`{inline(entry.default)}`"
    return keys


def readme_rows() -> dict[str, list[str]]:
    """The cells of README's table of keys (type, unit, default, meaning) by key."""
    section = README.read_text(encoding="utf-8").split("## Every key")[1]
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            key, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert key.strip("`") not in rows
            rows[key.strip("`")] = cells
    return rows


def test_the_recipes_are_those_of_the_design() -> None:
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_what_show_prints_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    shown = tmp_path / "shown.toml"
    shown.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(shown)) == recipe
    assert load_recipe(str(shown)).digest() == recipe.digest()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_for_its_gpu(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.compute_capability == CAPABILITIES[name]
    word = name.split("-")[0].removeprefix("rtx")
    assert word in recipe.gpu.lower()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("area", [MODEL_AREA, 256 * 256])
def test_every_bucket_fits_its_limits(name: str, area: int) -> None:
    limits = load_recipe(name).shape_limits(area)
    assert limits.buckets
    assert all(fits(limits, bucket.width, bucket.height) for bucket in limits.buckets)


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_prompts_of_the_models_fit(name: str) -> None:
    recipe = load_recipe(name)
    instruction, edit_image, plus_images = 1024, 1369, 3 * 196
    assert recipe.shapes.prompt_tokens.max >= instruction + max(edit_image, plus_images)
    assert recipe.shapes.references == Range(min=1, opt=1, max=3)


@pytest.mark.parametrize("name", NAMES)
def test_quantization_and_what_it_leaves_alone(name: str) -> None:
    components = load_recipe(name).components
    expected = {"a100-int8": "int8-smooth", **dict.fromkeys(("a100", "a100-40gb", "a100-trtllm", "cpu"), "none")}.get(
        name, "fp8"
    )
    assert components.transformer.scheme == expected
    assert components.language.scheme == "none"
    if expected == "none":
        assert components.transformer.exclude == ()
    else:
        assert components.transformer.exclude == tuple(f"transformer_blocks.{block}.*" for block in (0, 1, -2, -1))


@pytest.mark.parametrize("name", NAMES)
def test_schedules(name: str) -> None:
    recipe = load_recipe(name)
    pairs = [(schedule.steps, schedule.guidance) for schedule in recipe.schedules]
    assert pairs == [(20 if name == "cpu" else 40, 4.0), (8, 1.0), (4, 1.0)]
    assert recipe.noise == ("float32" if name == "cpu" else "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_small_gpus_load_engines_in_turn(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.residency == ("resident" if recipe.memory_gib > 40 else "sequential")


def test_readme_lists_every_key_and_no_other() -> None:
    assert set(readme_rows()) == {*schema_keys(), "extends"}


def test_readme_has_the_defaults_of_the_schema() -> None:
    defaults = {key: cells[2] for key, cells in readme_rows().items() if key != "extends"}
    assert defaults == schema_keys()


def test_readme_says_type_and_meaning_of_every_key() -> None:
    for key, cells in readme_rows().items():
        assert len(cells) == 4, key
        assert cells[0], key
        assert cells[3], key


def literal_words(kind: Any) -> set[str]:
    """The words that an annotation allows, at any depth; a ``OneOf`` allows the keys of its table."""
    rules = [rule for rule in getattr(kind, "__metadata__", ()) if isinstance(rule, OneOf)]
    if rules:
        return set(rules[0].table)
    return {arg for arg in get_args(kind) if isinstance(arg, str)}.union(*map(literal_words, get_args(kind)))


@pytest.mark.parametrize(
    ("table", "prefix"), [(Recipe, ""), (ComponentRecipe, "components.NAME.")], ids=["recipe", "component"]
)
def test_readme_lists_every_word_of_a_key(table: type, prefix: str) -> None:
    rows = readme_rows()
    kinds = get_type_hints(table, include_extras=True)
    for name in ("backends", "residency", "noise", "precision", "scheme"):
        if name in kinds:
            words = set(re.findall(r'"([^"]+)"', rows[prefix + name][0]))
            assert words == literal_words(kinds[name]), name


def test_readme_has_a_row_for_every_recipe() -> None:
    table = README.read_text(encoding="utf-8").split("## A recipe of your own")[0]
    assert sorted(re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)) == sorted(NAMES)


def test_the_example_of_readme_is_a_recipe(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert example is not None
    path = tmp_path / "mine.toml"
    path.write_text(example[1], encoding="utf-8")
    recipe = load_recipe(str(path))
    assert recipe.shapes.batch.max == 8
    assert recipe.components.transformer.scheme == "fp8"
