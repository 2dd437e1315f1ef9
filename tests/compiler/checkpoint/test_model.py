"""The model of a checkpoint: what its configs become, and components that do not belong together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Schedule
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.specs import Areas
from qie.engines.errors import CheckpointError

CONFIGS = {
    "model_index": "model_index.json",
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "preprocessor": "processor/preprocessor_config.json",
}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Configs and tokenizer of an architecture, opened with ``values`` in one of its configs."""

    def opened(name: str, config: str = "model_index", **values: Any) -> Checkpoint:
        folder = tmp_path / name
        if not folder.exists():
            write_checkpoint(folder, ARCHITECTURES[name], weights=False)
        file = folder / CONFIGS[config]
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return open_checkpoint(str(folder), weights=False)

    return opened


Opened = Callable[..., Checkpoint]


# Areas, schedules


def test_areas_of_the_pipelines(opened: Opened) -> None:
    assert opened("tiny", _qie={}).model.areas == Areas(vae_area=1048576, condition_area=147456)
    assert opened("tiny-edit", _qie={}).model.areas == Areas(vae_area=1048576, condition_area=None)


def test_areas_of_a_small_model(opened: Opened) -> None:
    assert opened("tiny").model.areas == Areas(vae_area=128 * 128, condition_area=128 * 128)
    assert opened("tiny-edit").model.areas == Areas(vae_area=128 * 128, condition_area=None)
    assert opened("demo").model.areas == Areas(vae_area=256 * 256, condition_area=224 * 224)


@pytest.mark.parametrize(
    "own",
    [{"vae_area": 1023}, {"condition_area": "large"}, {"area": 4096}, {"vae_area": None}, {"about": 3}, [1], 5, "x"],
)
def test_areas_that_are_none(opened: Opened, own: Any) -> None:
    with pytest.raises(CheckpointError, match="model_index.json: _qie = .*, expected vae_area and condition_area"):
        opened("tiny", _qie=own)


def test_the_schedule_of_a_small_model_comes_first(opened: Opened) -> None:
    recipe = load_recipe("cpu")
    assert opened("tiny").model.schedules(recipe) == recipe.schedules
    model = opened("tiny", _qie={"schedule": {"steps": 6, "guidance": 1.5}, "about": "six steps"}).model
    assert model.schedules(recipe) == (Schedule(steps=6, guidance=1.5), *recipe.schedules)
    assert model.areas == Areas(vae_area=1048576, condition_area=147456)
    assert model.about == "six steps"


@pytest.mark.parametrize(
    "own",
    [5, {}, {"steps": 4}, {"steps": 0, "guidance": 1.0}, {"steps": True, "guidance": 1.0}, {"steps": 4, "guidance": 0},
     {"steps": 4, "guidance": True}],
)  # fmt: skip
def test_schedules_that_are_none(opened: Opened, own: Any) -> None:
    with pytest.raises(CheckpointError, match=r"_qie\.schedule = .*, expected 1 to 1000 steps and guidance from 1 to"):
        opened("tiny", _qie={"schedule": own})


# Constants of the runtime


def test_edit_plus(opened: Opened) -> None:
    model = opened("tiny").model
    assert (model.pipeline, model.prompt.pipeline, model.references_max) == ("edit_plus", "edit_plus", 3)
    assert model.limits(load_recipe("l40s")).references_max == 3
    assert model.rotary.axes_dims == (8, 12, 12)
    assert model.prompt.image_token_id == model.image_token_id
    assert (model.processor.patch_size, model.processor.merge_size, model.processor.window_size) == (14, 2, 112)
    assert (model.scheduler.shift_terminal, model.scheduler.max_shift) == (0.02, 0.9)


def test_edit_takes_one_image(opened: Opened) -> None:
    model = opened("tiny-edit").model
    assert (model.pipeline, model.prompt.pipeline, model.references_max) == ("edit", "edit", 1)
    assert model.limits(load_recipe("l40s")).references_max == 1


def test_the_published_model(opened: Opened) -> None:
    model = opened("qwen-image-edit-2511").model
    assert model.rotary.axes_dims == (16, 56, 56)
    assert model.processor.head_dim == 80
    assert model.areas == Areas(vae_area=1048576, condition_area=147456)


# Components of different models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_belongs_together(opened: Opened, name: str) -> None:
    check_tokenizer(opened(name))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        ("transformer", {"joint_attention_dim": 128}, "text encoder is 64 wide, the transformer expects 128; take all"),
        ("transformer", {"in_channels": 32}, "takes 32 channels a token, the VAE makes 64; take all components from"),
        ("text_encoder", {"image_token_id": None}, "image_token_id = None, expected a whole number; restore"),
        ("text_encoder", {"image_token_id": True}, "image_token_id = True, expected a whole number; restore"),
        ("preprocessor", {"patch_size": 16}, "patch_size = 16, expected 14 for this vision tower; take both"),
    ],
)
def test_components_of_different_models(opened: Opened, config: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened("tiny", config, **values)


def test_a_tokenizer_of_another_model(opened: Opened) -> None:
    with pytest.raises(CheckpointError, match=r"image_token_id = 1, but <\|image_pad\|> is \d+ in the tokenizer; take"):
        check_tokenizer(opened("tiny", "text_encoder", image_token_id=1))


def test_a_vocabulary_of_another_model(opened: Opened, tmp_path: Path) -> None:
    """Its template has another number of tokens than the pipeline drops."""
    folder = tmp_path / "other"
    shutil.copytree(opened("tiny").path, folder)
    for file in folder.glob("*/tokenizer.json"):
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
        file.write_text(json.dumps(tokenizer))
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    with pytest.raises(CheckpointError, match=r"prefix into \d+ tokens, expected 64; restore the tokenizer"):
        check_tokenizer(open_checkpoint(str(folder), weights=False))
