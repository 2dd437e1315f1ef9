"""Backends of a recipe: names of the table, and the components that each can run."""

from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe
from qie.engines.backends import BACKENDS
from qie.engines.errors import RecipeError

GPU = """
gpu = "Test GPU"
compute_capability = "8.9"
memory_gib = 24
backends = ["tensorrt"]
"""


def recipe_with(folder: Path, backends: str) -> str:
    path = folder / "mine.toml"
    path.write_text(GPU.replace('"tensorrt"', backends), encoding="utf-8")
    return str(path)


def refusal(folder: Path, backends: str) -> str:
    """The message with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_with(folder, backends))
    return str(caught.value)


@pytest.fixture
def partial_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made-up backends that run only some components."""
    for name, components in (("reader", ("language",)), ("seer", ("vision", "language"))):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS["tensorrt"], components=components))


def test_a_backend_is_one_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ", ".join(f'"{name}"' for name in BACKENDS)
    assert f'mine.toml is "abacus"; set it to a backend ({names})' in refusal(tmp_path, '"abacus"')
    monkeypatch.setitem(BACKENDS, "abacus", BACKENDS["tensorrt"])
    assert load_recipe(recipe_with(tmp_path, '"abacus"')).backends == ("abacus",)


@pytest.mark.usefixtures("partial_backends")
@pytest.mark.parametrize(("backends", "missing"), [('"reader"', "vision"), ('"seer"', "vae_encoder"), ("", "vision")])
def test_every_component_needs_a_backend(tmp_path: Path, backends: str, missing: str) -> None:
    message = refusal(tmp_path, backends)
    assert f"lists no backend that runs {missing}" in message


@pytest.mark.usefixtures("partial_backends")
def test_backends_of_a_component_keep_their_order(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_with(tmp_path, '"reader", "tensorrt", "seer"'))
    assert recipe.backends_of("language") == ("reader", "tensorrt", "seer")
    assert recipe.backends_of("vision") == ("tensorrt", "seer")
    assert recipe.backends_of("transformer") == ("tensorrt",)
