"""From names to a plan: models, recipes, LoRAs, calibration and destination."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.planning.resolve import bundle_name, plan_build
from qie.engines.errors import BuildError, CalibrationError, CheckpointError, RecipeError


@pytest.mark.parametrize(
    ("checkpoint_name", "recipe_name", "expected"),
    [
        ("Qwen/Qwen-Image-Edit-2511", "l40s", "qwen-image-edit-2511-l40s"),
        ("Qwen/Qwen-Image-Edit-2511", "L40S", "qwen-image-edit-2511-l40s"),
        ("my model (2)", "recipes of mine/Big GPU.toml", "my-model-2-big-gpu"),
        ("...", "cpu", "cpu"),
        ("模型", "cpu", "cpu"),
        ("v1.1", "cpu", "v1.1-cpu"),
    ],
)
def test_names(checkpoint_name: str, recipe_name: str, expected: str) -> None:
    assert bundle_name(checkpoint_name, recipe_name) == expected


def test_defaults(checkpoint: Path, qie_home: Path) -> None:
    plan = plan_build(checkpoint)
    assert (plan.recipe_name, plan.recipe.gpu, plan.loras, plan.calibration) == ("cpu", "CPU", (), None)
    assert plan.destination == qie_home / "bundles" / "tiny-cpu"
    assert not plan.checkpoint.complete
    assert plan_build(str(checkpoint), name="mine").destination == qie_home / "bundles" / "mine"
    assert plan_build(checkpoint, name="mine", out="here").destination == Path("here")


def test_loras_by_path_with_and_without_weight(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    thin = np.ones((2, 64), np.float32)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": thin, f"{layer}.lora_B.weight": np.ones((64, 2), np.float32)}, path)
    plan = plan_build(checkpoint, loras=[path, str(path), f"{path}:0.5", (path, -0.25)])
    assert [lora.weight for lora in plan.loras] == [1.0, 1.0, 0.5, -0.25]


def test_calibration_is_the_given_or_the_recipes_or_the_models(checkpoint: Path, tmp_path: Path) -> None:
    assert plan_build("pocket").calibration is None  # nothing is quantized
    own = plan_build("pocket", gpu="l40s").calibration
    assert own is not None
    assert own.source == POCKET / "calibration.npz"
    given = tmp_path / "given.npz"
    given.write_bytes((POCKET / "calibration.npz").read_bytes())
    (tmp_path / "mine.toml").write_text('extends = "cpu"\ncalibration = "given.npz"\n')
    for plan in (plan_build("pocket", calibration=given), plan_build("pocket", gpu=tmp_path / "mine.toml")):
        assert plan.calibration is not None
        assert plan.calibration.source == given
    assert plan_build(checkpoint).calibration is None


def test_what_cannot_be_resolved_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='no recipe "l40"'):
        plan_build(checkpoint, gpu="l40")
    with pytest.raises(CheckpointError, match="there is no checkpoint 'nowhere'"):
        plan_build("nowhere")
    with pytest.raises(CheckpointError, match="no.safetensors"):
        plan_build(checkpoint, loras=[tmp_path / "no.safetensors"])
    with pytest.raises(CalibrationError, match="no.npz"):
        plan_build(checkpoint, calibration=tmp_path / "no.npz")
    with pytest.raises(BuildError, match="the name of the bundle is 'a/b'") as raised:
        plan_build(checkpoint, name="a/b")
    assert raised.value.option == "name"


@pytest.mark.parametrize(
    ("loras", "expected"),
    [([], "pocket-cpu"), (["Style V1.0"], "pocket-cpu-style-v1.0"), (["a", "b"], "pocket-cpu-a-b")],
)
def test_a_lora_is_in_the_default_name(loras: list[str], expected: str) -> None:
    assert bundle_name("pocket", "cpu", loras) == expected


def test_a_long_name_ends_in_a_digest() -> None:
    one, other = (bundle_name("pocket", "cpu", [f"{'style-' * 60}{number}"]) for number in (1, 2))
    assert one != other
    assert len(one) <= 80 and one.startswith("pocket-cpu-style-")
