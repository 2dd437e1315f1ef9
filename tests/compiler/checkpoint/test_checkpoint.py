"""Checkpoints: what opens, what is read, and one clear error for everything broken."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.checkpoint.safetensors import open_file, open_subfolder
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.errors import CheckpointError
from tests.support.checkpoints import FILES, INDEX, SHARDS, TRANSFORMER, write_json, write_shards


def test_opens_a_folder(small_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(small_checkpoint))
    assert (checkpoint.name, checkpoint.revision, checkpoint.model.pipeline) == ("model", None, "edit_plus")
    model = checkpoint.model
    assert (model.transformer.layers, model.language.layers, model.vision.depth, model.vae.z_dim) == (2, 3, 1, 16)
    assert (model.scheduler.shift, model.processor.patch_size, model.image_token_id) == (1.5, 14, 4)


def test_pipeline_of_the_single_image_model(small_checkpoint: Path) -> None:
    write_json(small_checkpoint / "model_index.json", {"_class_name": "QwenImageEditPipeline"})
    (small_checkpoint / "processor/preprocessor_config.json").unlink()
    model = open_checkpoint(str(small_checkpoint)).model
    assert (model.pipeline, model.references_max, model.processor.merge_size) == ("edit", 1, 2)


def test_configs_alone_are_enough_without_weights(small_checkpoint: Path) -> None:
    for file in small_checkpoint.rglob("*.safetensors*"):
        file.unlink()
    assert not open_checkpoint(str(small_checkpoint), weights=False).complete
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(small_checkpoint))


def test_reads_tensors_of_every_dtype(small_checkpoint: Path) -> None:
    tensors = {
        "b": TRANSFORMER["img_in.weight"],
        "f": np.array([[1.5, -2]], np.float32),
        "h": np.array([0.25], np.float16),
        "e4m3": np.array([1, 448], ml_dtypes.float8_e4m3fn),
        "e5m2": np.array([1, -2], ml_dtypes.float8_e5m2),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = small_checkpoint / "some.safetensors"
    save_file(tensors, path, metadata={"who": "me"})
    reader = open_file(path)
    assert set(reader.names()) == set(tensors)
    assert reader.metadata == {"who": "me"}
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert (reader.shape(name), reader.dtype(name)) == (tensor.shape, tensor.dtype.name)
        assert read.dtype == tensor.dtype and read.shape == tensor.shape
        assert read.tobytes() == tensor.tobytes()
    assert not reader.read("f").flags.owndata, "a copy instead of a view of the mapped file"


def test_text_encoder_has_one_name_for_old_and_new_prefixes(small_checkpoint: Path) -> None:
    reader = open_checkpoint(str(small_checkpoint)).reader("text_encoder")
    old = {name: reader.read(name).copy() for name in reader.names()}
    new_names = {
        "visual.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
    }
    renamed = {shard: {new_names[name]: t for name, t in tensors.items()} for shard, tensors in SHARDS.items()}
    write_shards(small_checkpoint / "text_encoder", renamed)
    new = open_checkpoint(str(small_checkpoint)).reader("text_encoder")
    expected = {
        "visual.patch_embed.proj.weight",
        "language_model.embed_tokens.weight",
        "language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    }
    assert set(old) == set(new.names()) == expected
    for name in expected:
        np.testing.assert_array_equal(old[name], new.read(name))
    np.testing.assert_array_equal(old["language_model.layers.0.mlp.up_proj.weight"], np.full((4, 2), 3))


def test_both_prefixes_at_once_are_refused(small_checkpoint: Path) -> None:
    names = ("model.norm.weight", "model.language_model.norm.weight")
    write_shards(
        small_checkpoint / "text_encoder", {"model-00001-of-00001.safetensors": {n: np.ones(2) for n in names}}
    )
    with pytest.raises(CheckpointError, match=r"'language_model\.norm\.weight' twice"):
        open_checkpoint(str(small_checkpoint))


def test_sharded_files_in_the_naming_of_diffusers(tmp_path: Path) -> None:
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(TRANSFORMER, tmp_path / shard)
    save_file({"wrong": np.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": dict.fromkeys(TRANSFORMER, shard)})
    assert set(open_subfolder(tmp_path).names()) == set(TRANSFORMER)


def test_a_missing_tensor_is_named_with_its_file(small_checkpoint: Path) -> None:
    reader = open_checkpoint(str(small_checkpoint)).reader("text_encoder")
    for call in (reader.shape, reader.dtype, reader.read):
        with pytest.raises(CheckpointError, match=rf"{INDEX} has no tensor 'nothing'; download"):
            call("nothing")


@pytest.mark.parametrize("source", ["no/such/folder", "/no/such/folder", "nothing", ""])
def test_neither_folder_nor_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match="there is no checkpoint '.*'; name a folder, pocket, or a hub id|has no model_index"
    ):
        open_checkpoint(source)


def test_a_folder_has_no_revision(small_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="leave the revision out"):
        open_checkpoint(str(small_checkpoint), revision="main")


def test_another_pipeline_names_the_two(small_checkpoint: Path) -> None:
    write_json(small_checkpoint / "model_index.json", {"_class_name": "QwenImage21Pipeline"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(small_checkpoint))
    for word in ("QwenImage21Pipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        assert word in str(caught.value)


@pytest.mark.parametrize("file", [*list(FILES)[:4], "tokenizer"])
def test_a_missing_component_is_named(small_checkpoint: Path, file: str) -> None:
    shutil.rmtree(small_checkpoint / Path(file).parts[0])
    with pytest.raises(CheckpointError, match=rf"lacks {file}.*download the checkpoint again"):
        open_checkpoint(str(small_checkpoint), weights=False)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\xff"])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "processor/preprocessor_config.json"])
def test_a_config_that_is_no_json_object(small_checkpoint: Path, file: str, text: str) -> None:
    (small_checkpoint / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{file} .*download it again"):
        open_checkpoint(str(small_checkpoint), weights=False)


def test_a_quantized_checkpoint_is_refused(small_checkpoint: Path) -> None:
    write_json(small_checkpoint / "transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(
        CheckpointError,
        match=r"transformer/config\.json .*quantized checkpoint, expected bfloat16 weights; take the original",
    ):
        open_checkpoint(str(small_checkpoint))


def test_pocket_is_the_shipped_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of that name lies that is none."""
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("pocket").path == POCKET
    (tmp_path / "pocket").mkdir()
    assert open_checkpoint("pocket").path == POCKET
    write_checkpoint(tmp_path / "own", ARCHITECTURES["tiny"])
    (tmp_path / "pocket").rmdir()
    (tmp_path / "own").rename(tmp_path / "pocket")
    assert open_checkpoint("pocket").path == tmp_path / "pocket"
