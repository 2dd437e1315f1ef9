"""What the runtime is told of a checkpoint, and the parts that do not belong together."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.checkpoint.model import areas, check_parts, model_record, schedules
from qie.compiler.recipe.schema import Schedule, load_recipe
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.manifest import FileRecord, ModulationRecord
from qie.engines.bundle.specs import Areas
from qie.engines.errors import CheckpointError

MODULATION = ModulationRecord(
    file=FileRecord(path="modulation.weights", bytes=0, sha256=""),
    tables="float32",
    tensors=(),
    layers=2,
    width=64,
    zero_cond_t=True,
)


@pytest.fixture(scope="module")
def open_preset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Configs and tokenizer of a preset, by its name."""
    folder = tmp_path_factory.mktemp("presets")

    def open_preset(name: str) -> Checkpoint:
        if not (folder / name).exists():
            write_checkpoint(folder / name, ARCHITECTURES[name], weights=False)
        return open_checkpoint(str(folder / name), weights=False)

    return open_preset


Open = Callable[[str], Checkpoint]


def changed(checkpoint: Checkpoint, part: str, **values: Any) -> Checkpoint:
    return replace(checkpoint, **{part: {**getattr(checkpoint, part), **values}})


# Areas


def test_areas_of_the_pipelines(open_preset: Open) -> None:
    plain = {"_class_name": "as it is published"}
    assert areas(replace(open_preset("tiny"), model_index=plain)) == Areas(vae_area=1048576, condition_area=147456)
    assert areas(replace(open_preset("tiny-edit"), model_index=plain)) == Areas(vae_area=1048576, condition_area=None)


def test_areas_of_a_small_model(open_preset: Open) -> None:
    assert areas(open_preset("tiny")) == Areas(vae_area=128 * 128, condition_area=128 * 128)
    assert areas(open_preset("tiny-edit")) == Areas(vae_area=128 * 128, condition_area=None)
    demo = areas(open_preset("demo"))
    assert demo == Areas(vae_area=256 * 256, condition_area=224 * 224)


@pytest.mark.parametrize(
    "own",
    [{"vae_area": 1023}, {"condition_area": "large"}, {"area": 4096}, {"vae_area": None}, {"about": 3}, [1], 5, "x"],
)
def test_areas_that_are_none(open_preset: Open, own: Any) -> None:
    with pytest.raises(CheckpointError, match="model_index.json: _qie.* expected vae_area and condition_area"):
        areas(changed(open_preset("tiny"), "model_index", _qie=own))


def test_the_schedule_of_a_small_model_comes_first(open_preset: Open) -> None:
    recipe, plain = load_recipe("cpu"), open_preset("tiny")
    assert schedules(plain, recipe) == recipe.schedules
    own = changed(plain, "model_index", _qie={"schedule": {"steps": 6, "guidance": 1.5}})
    assert schedules(own, recipe) == (Schedule(steps=6, guidance=1.5), *recipe.schedules)
    assert areas(own) == Areas(vae_area=1048576, condition_area=147456)


@pytest.mark.parametrize(
    "own",
    [5, {}, {"steps": 4}, {"steps": 0, "guidance": 1.0}, {"steps": True, "guidance": 1.0}, {"steps": 4, "guidance": 0}],
)
def test_schedules_that_are_none(open_preset: Open, own: Any) -> None:
    with pytest.raises(CheckpointError, match=r"_qie\.schedule = .*; expected steps, at least 1, and guidance, from 1"):
        schedules(changed(open_preset("tiny"), "model_index", _qie={"schedule": own}), load_recipe("cpu"))


# The record


def test_record_of_edit_plus(open_preset: Open) -> None:
    record = model_record(open_preset("tiny"), digest="abc", modulation=MODULATION)
    assert (record.name, record.revision, record.digest, record.pipeline) == ("tiny", None, "abc", "edit_plus")
    assert record.rotary.axes_dims == (8, 12, 12)
    assert record.latent_channels == 16
    assert record.modulation == MODULATION
    assert record.prompt.pipeline == "edit_plus"
    assert record.prompt.image_token_id == open_preset("tiny").text_encoder["image_token_id"]
    assert (record.vision.patch_size, record.vision.merge_size, record.vision.window_size) == (14, 2, 112)
    assert (record.scheduler.shift_terminal, record.scheduler.max_shift) == (0.02, 0.9)


def test_record_of_edit(open_preset: Open) -> None:
    record = model_record(open_preset("tiny-edit"), digest="abc", modulation=MODULATION)
    assert record.pipeline == record.prompt.pipeline == "edit"
    assert record.areas.condition_area is None


def test_record_of_a_hub_id(open_preset: Open) -> None:
    checkpoint = replace(open_preset("tiny"), name="Qwen/Qwen-Image-Edit-2511", revision="0123abcd")
    record = model_record(checkpoint, digest="abc", modulation=MODULATION)
    assert (record.name, record.revision) == ("Qwen/Qwen-Image-Edit-2511", "0123abcd")


def test_record_of_the_published_model(open_preset: Open) -> None:
    record = model_record(open_preset("qwen-image-edit-2511"), digest="abc", modulation=MODULATION)
    assert record.rotary.axes_dims == (16, 56, 56)
    assert record.vision.head_dim == 80
    assert record.areas == Areas(vae_area=1048576, condition_area=147456)


# Parts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_of_a_preset_belong_together(open_preset: Open, name: str) -> None:
    check_parts(open_preset(name))


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        ("transformer", {"joint_attention_dim": 128}, "text encoder is 64 wide, the transformer expects 128; they are"),
        ("transformer", {"in_channels": 32}, "takes 32 channels a token, the VAE makes 64; they are parts of"),
        ("text_encoder", {"image_token_id": 1}, r"image_token_id = 1, but <\|image_pad\|> is \d+ in the tokenizer;"),
        ("text_encoder", {"image_token_id": None}, "image_token_id = None, but"),
        ("preprocessor", {"patch_size": 16}, "patch_size = 16, but this vision tower needs 14: take both files"),
    ],
)
def test_parts_of_different_models(open_preset: Open, part: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        check_parts(changed(open_preset("tiny"), part, **values))


def test_a_vocabulary_of_another_model(open_preset: Open, tmp_path: Path) -> None:
    """Its template has another number of tokens than the pipeline drops."""
    folder = tmp_path / "other"
    shutil.copytree(open_preset("tiny").path, folder)
    for file in folder.glob("*/tokenizer.json"):
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
        file.write_text(json.dumps(tokenizer))
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    with pytest.raises(CheckpointError, match=r"prefix into \d+ tokens, the pipeline drops 64; restore the tokenizer"):
        check_parts(open_checkpoint(str(folder), weights=False))
