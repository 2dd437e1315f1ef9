"""Recipes that tests write, and the messages with which they are refused."""

from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe
from qie.engines.errors import RecipeError

GPU = """
gpu = "Test GPU"
compute_capability = "8.9"
memory_gib = 24
backends = ["tensorrt"]
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(folder: Path, text: str) -> str:
    """Return the message with which a recipe is refused, which always names its file."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert path in str(caught.value)
    return str(caught.value).replace(path, "FILE")
