"""A backend of its own for a component, in a recipe or by name."""

from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe, parse_recipe, with_backend
from qie.compiler.recipe.schema import to_toml
from qie.engines.errors import RecipeError
from tests.support.recipes import GPU, refusal, write


@pytest.mark.parametrize(
    ("name", "others"), [("l40s", ("tensorrt-rtx", "tensorrt")), ("a100", ("tensorrt", "tensorrt-rtx"))]
)
def test_the_recipes_for_tensorrt_llm(name: str, others: tuple[str, ...]) -> None:
    """As the plain ones, whose backends stay for machines without TensorRT-LLM."""
    plain, recipe = load_recipe(name), load_recipe(f"{name}-trtllm")
    assert recipe.backends_of("language") == ("tensorrt-llm", *others)
    assert recipe.backends_of("vision") == recipe.backends_of("transformer") == others
    assert with_backend(plain, "language", "tensorrt-llm") == recipe
    assert parse_recipe(to_toml(recipe), Path("again.toml")) == recipe


def test_a_backend_that_the_recipe_has_comes_first() -> None:
    recipe = with_backend(load_recipe("l40s"), "language", "tensorrt")
    assert recipe.backends_of("language") == ("tensorrt", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            'vision]\nbackend = "tensorrt-llm"',
            'vision.backend in FILE is "tensorrt-llm", which runs only language;',
        ),
        (
            'language]\nbackend = "tensorrt-llm"\nprecision = "float32"',
            'language.backend in FILE is "tensorrt-llm", which computes in bfloat16 and not in float32; name',
        ),
        ('language]\nbackend = "llm"', 'language.backend in FILE is "llm"; set it to a backend ("onnxruntime"'),
        (
            'language]\nbackend = "tensorrt-llm"\nattention = "fp8"',
            'language.backend in FILE is "tensorrt-llm", which does not compute attention in FP8; name',
        ),
    ],
)
def test_a_backend_that_cannot_run_it(tmp_path: Path, section: str, message: str) -> None:
    text = GPU.replace('["tensorrt"]', '["tensorrt-rtx"]').replace("8.9", "9.0") + f"[components.{section}"
    if "attention" in section:
        text = text.replace('["tensorrt-rtx"]', '["tensorrt"]')
    assert message in refusal(tmp_path, text)


def test_a_cpu(tmp_path: Path) -> None:
    text = 'extends = "cpu"\n[components.language]\nbackend = "tensorrt"\n'
    assert 'language.backend in FILE is "tensorrt", which needs a GPU; set compute_capability' in refusal(
        tmp_path, text
    )
    with pytest.raises(
        RecipeError, match="language of a recipe for CPU cannot run on tensorrt, which needs a GPU"
    ) as e:
        with_backend(load_recipe("cpu"), "language", "tensorrt")
    assert e.value.option == "language"


@pytest.mark.parametrize(
    ("component", "backend", "message"),
    [
        ("language", "llm", 'there is no backend "llm"; use one of onnxruntime, tensorrt-rtx'),
        ("vision", "tensorrt-llm", "vision of a recipe for L40S cannot run on tensorrt-llm, which runs only language"),
    ],
)
def test_a_backend_by_name(component: str, backend: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_backend(load_recipe("l40s"), component, backend)  # type: ignore[arg-type]


def test_it_is_part_of_the_digest(tmp_path: Path) -> None:
    own = load_recipe(write(tmp_path, GPU + '[components.language]\nbackend = "tensorrt-llm"\n'))
    assert own.digest() != load_recipe(write(tmp_path, GPU)).digest()
