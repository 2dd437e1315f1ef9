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


QUANTIZED = """
[components.transformer]
scheme = "{}"
precision = "{}"
"""


@pytest.mark.parametrize("scheme", ["fp8", "int8-smooth", "w8a16", "w4a16"])
def test_onnxruntime_runs_no_quantized_bfloat16_on_a_gpu(tmp_path: Path, scheme: str) -> None:
    text = GPU + QUANTIZED.format(scheme, "bfloat16")
    (tmp_path / "mine.toml").write_text(text.replace("tensorrt", "onnxruntime"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "mine.toml"))
    assert str(caught.value) == (
        f'components.transformer.scheme in {tmp_path / "mine.toml"} is "{scheme}" in bfloat16, for which onnxruntime '
        'has no kernels on a GPU; use "none" or precision "float32", or add another backend'
    )


def test_quantized_bfloat16_goes_to_another_backend(tmp_path: Path) -> None:
    text = GPU.replace('"tensorrt"', '"onnxruntime", "tensorrt"') + QUANTIZED.format("fp8", "bfloat16")
    (tmp_path / "mine.toml").write_text(text)
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert recipe.backends_of("transformer") == ("tensorrt",)
    assert recipe.backends_of("vision") == ("onnxruntime", "tensorrt")


def test_quantized_float32_runs_anywhere(tmp_path: Path) -> None:
    text = GPU.replace("tensorrt", "onnxruntime") + QUANTIZED.format("fp8", "float32")
    (tmp_path / "mine.toml").write_text(text)
    assert load_recipe(str(tmp_path / "mine.toml")).backends_of("transformer") == ("onnxruntime",)
