"""A random checkpoint is the real architecture: diffusers and transformers load it, and a seed decides its bytes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, tensor_shapes, write_checkpoint
from qie.engines.errors import CheckpointError

TINY = ARCHITECTURES["tiny"]
GENERATIONS = ("tiny-edit", "tiny-2509", "tiny")
PUBLISHED = ("qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511")


def read(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor below a folder, by name."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def canonical_name(name: str) -> str:
    """A stored or loaded tensor's name as ``Weight`` has it; only the text encoder's differ."""
    decoder = re.sub(r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.", name)
    return decoder.removeprefix("model.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", TINY)


def load(folder: Path) -> dict[Subfolder, tuple[Any, dict[str, Any]]]:
    """The three models and what transformers and diffusers say about the loading."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    classes: dict[Subfolder, Any] = {
        "transformer": diffusers.QwenImageTransformer2DModel,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration,
        "vae": diffusers.AutoencoderKLQwenImage,
    }
    return {part: kind.from_pretrained(folder / part, output_loading_info=True) for part, kind in classes.items()}


@pytest.mark.parametrize("name", GENERATIONS)
def test_models_load_with_exactly_these_tensors(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", ARCHITECTURES[name])
    for part, (model, report) in load(folder).items():
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], part
        stored = {canonical_name(key): value for key, value in read(folder / part).items()}
        loaded = {canonical_name(key): value.numpy() for key, value in model.state_dict().items()}
        shapes = tensor_shapes(ARCHITECTURES[name])[part]
        assert {key: value.shape for key, value in stored.items()} == shapes
        assert loaded.keys() == shapes.keys()
        for key, value in stored.items():
            np.testing.assert_array_equal(value, loaded[key], err_msg=key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dimensions(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    shapes = tensor_shapes(ARCHITECTURES[name])
    folder = write_checkpoint(tmp_path / "checkpoint", ARCHITECTURES[name], weights=False)
    transformer_config = diffusers.QwenImageTransformer2DModel.load_config(folder / "transformer")
    vae_config = diffusers.AutoencoderKLQwenImage.load_config(folder / "vae")
    with torch.device("meta"):
        config = transformers.Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
        models: dict[Subfolder, Any] = {
            "transformer": diffusers.QwenImageTransformer2DModel.from_config(transformer_config),
            "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
            "vae": diffusers.AutoencoderKLQwenImage.from_config(vae_config),
        }
    assert models["transformer"].config.zero_cond_t is (name == "qwen-image-edit-2511")
    for part, model in models.items():
        expected = {canonical_name(key): tuple(value.shape) for key, value in model.state_dict().items()}
        assert shapes[part] == expected
    assert sum(math.prod(shape) for shape in shapes["transformer"].values()) == 20_430_401_088
    assert sum(math.prod(shape) for shape in shapes["text_encoder"].values()) == 8_292_166_656


@pytest.mark.parametrize(("name", "prefixes"), [("tiny-edit", {"visual", "model"}), ("tiny", {"model"})])
def test_both_namings_of_the_text_encoder(name: str, prefixes: set[str], tmp_path: Path) -> None:
    stored = read(write_checkpoint(tmp_path / "checkpoint", ARCHITECTURES[name]) / "text_encoder")
    assert {key.partition(".")[0] for key in stored} == prefixes | {"lm_head"}


def test_configs_keep_the_decoders_rotary_sections(tiny: Path) -> None:
    encoder = load(tiny)["text_encoder"][0]
    assert tuple(encoder.model.language_model.rotary_emb.mrope_section) == TINY.text_mrope_section
    assert encoder.config.text_config.rope_parameters["rope_theta"] == 1e6
    assert encoder.config.text_config.rms_norm_eps == 1e-6


@pytest.mark.parametrize("kind", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_the_pipelines_prefix_has_64_tokens(kind: str, tiny: Path) -> None:
    pipelines = pytest.importorskip("diffusers")
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    pipeline = getattr(pipelines, kind)(**dict.fromkeys(parts))
    end = "<|im_start|>user\n"
    prefix = pipeline.prompt_template_encode.partition(end)[0] + end
    tokenizer = Tokenizer.from_file(str(tiny / "processor/tokenizer.json"))
    assert len(tokenizer.encode(prefix).ids) == pipeline.prompt_template_encode_start_idx == 64


def test_both_tokenizer_folders_agree_with_the_single_file(tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    single = Tokenizer.from_file(str(tiny / "processor/tokenizer.json"))
    texts = (
        "Make it a zebra!",
        "  two  spaces\n\nand lines \t",
        "Ünïcode: 猫, e\u0301, \ufb01 and 🙂; it's 1234",
        "<|vision_start|><|image_pad|><|vision_end|>Picture 1: x<|im_end|>\n",
    )
    for folder in ("tokenizer", "processor"):
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tiny / folder)
        assert len(tokenizer) == single.get_vocab_size() <= TINY.text_vocab_size
        for text in texts:
            assert tokenizer(text)["input_ids"] == single.encode(text).ids
    assert single.decode(single.encode(texts[1]).ids) == texts[1]


def test_special_tokens_are_those_of_the_configs(tiny: Path) -> None:
    config = json.loads((tiny / "text_encoder/config.json").read_text())
    added = json.loads((tiny / "tokenizer/added_tokens.json").read_text())
    assert config["image_token_id"] == added["<|image_pad|>"]
    assert config["vision_start_token_id"] == added["<|vision_start|>"]
    assert min(added.values()) == len(json.loads((tiny / "tokenizer/vocab.json").read_text()))


def test_equal_seeds_give_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    assert contents(write_checkpoint(tmp_path / "same", TINY)) == contents(tiny)
    other = read(write_checkpoint(tmp_path / "other", TINY, seed=1))
    assert all((other[name] != values).any() for name, values in read(tiny).items())


def test_a_tensor_depends_on_its_name_alone(tiny: Path, tmp_path: Path) -> None:
    deeper = read(write_checkpoint(tmp_path / "deeper", replace(TINY, num_layers=3)))
    old = read(write_checkpoint(tmp_path / "old", replace(TINY, text_names="old")))
    for name, values in read(tiny).items():
        np.testing.assert_array_equal(values, deeper[name])
    np.testing.assert_array_equal(old["model.norm.weight"], deeper["model.language_model.norm.weight"])


def test_no_parameter_is_idle(tiny: Path) -> None:
    for name, values in read(tiny).items():
        assert np.isfinite(values).all()
        assert (values != 0).all() or values.size > 10_000, name
        assert np.unique(values).size > values.size * 0.99, name
    assert len({values.tobytes() for values in read(tiny).values()}) == len(read(tiny))
    kernel = read(tiny)["encoder.conv_in.weight"]
    assert not np.allclose(kernel[:, :, 0], kernel[:, :, 2])


def test_shards_hold_the_same_tensors(tiny: Path, tmp_path: Path) -> None:
    limit = 200_000
    folder = write_checkpoint(tmp_path / "sharded", TINY, shard_bytes=limit)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((folder / part / f"{stem}.safetensors.index.json").read_text())
        files = sorted(path.name for path in (folder / part).glob("*.safetensors"))
        assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
        whole, sharded = read(tiny / part), read(folder / part)
        assert index["metadata"]["total_size"] == sum(values.nbytes for values in whole.values())
        assert index["weight_map"].keys() == whole.keys() == sharded.keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(values, sharded[name])
        for file in files:
            names = load_file(folder / part / file).keys()
            assert all(index["weight_map"][name] == file for name in names)
            assert len(names) == 1 or sum(whole[name].nbytes for name in names) <= limit
    assert [path.name for path in (folder / "vae").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]
    load(folder)


def test_bfloat16_is_the_rounded_float32(tiny: Path, tmp_path: Path) -> None:
    rounded = read(write_checkpoint(tmp_path / "checkpoint", TINY, dtype="bfloat16"))
    for name, values in read(tiny).items():
        assert rounded[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(rounded[name], values.astype(ml_dtypes.bfloat16))


def test_without_weights_everything_else_is_there(tiny: Path, tmp_path: Path) -> None:
    files = contents(write_checkpoint(tmp_path / "checkpoint", TINY, weights=False))
    assert files == {path: data for path, data in contents(tiny).items() if not path.endswith(".safetensors")}


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write_checkpoint(tmp_path, TINY)
    assert contents(tmp_path) == {"mine": b"x"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.random, "PCG64", fail)  # the weights are drawn from it
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "checkpoint", TINY)
    assert not list(tmp_path.iterdir())
