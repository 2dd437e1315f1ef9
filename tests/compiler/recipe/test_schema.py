"""The schema: compute capabilities and the text of a resolved recipe."""

import dataclasses
from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe, parse_recipe, recipe_names
from qie.compiler.recipe.schema import supports_fp8, to_toml
from qie.engines.errors import RecipeError


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
