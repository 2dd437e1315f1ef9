"""Shards of a synthetic checkpoint are those that diffusers and transformers save."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save

from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.synthetic.layout import index_files, published_shard_bytes, shard_files

PUBLISHED = {"qwen-image-edit": 9, "qwen-image-edit-2509": 5, "qwen-image-edit-2511": 5}
SUBFOLDERS = ("transformer", "text_encoder")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The published models without memory, the text encoder with the names of transformers 5."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("configs") / "checkpoint"
    write_checkpoint(folder, ARCHITECTURES["qwen-image-edit-2511"], weights=False)
    with torch.device("meta"):
        transformer = diffusers.QwenImageTransformer2DModel
        text_encoder = transformers.Qwen2_5_VLForConditionalGeneration
        config = transformers.Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
        return {
            "transformer": transformer.from_config(transformer.load_config(folder / "transformer")),
            "text_encoder": text_encoder(config),
        }


@pytest.mark.parametrize("limit", [5 * 10**9, 10 * 10**9, 300 * 10**6])
@pytest.mark.parametrize("subfolder", SUBFOLDERS)
def test_shards_are_those_of_the_hub(subfolder: str, limit: int, models: dict[str, Any]) -> None:
    """A limit below the size of the embedding puts it into a shard of its own."""
    hub = pytest.importorskip("huggingface_hub")
    architecture = replace(ARCHITECTURES["qwen-image-edit-2511"], text_names="new")
    shards = shard_files(architecture, dtype="bfloat16", shard_bytes=lambda _: limit)
    mine = {
        shard.path.rpartition("/")[2]: [tensor.stored for tensor in shard.tensors]
        for shard in shards
        if shard.subfolder == subfolder
    }
    stem = "model" if subfolder == "text_encoder" else "diffusion_pytorch_model"
    state = {name: value.bfloat16() for name, value in models[subfolder].state_dict().items()}
    theirs = hub.split_torch_state_dict_into_shards(
        state, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=limit
    )
    assert mine == {file: sorted(names) for file, names in theirs.filename_to_tensors.items()}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_numbers_of_shards(name: str, count: int) -> None:
    architecture = ARCHITECTURES[name]
    shards = shard_files(architecture, dtype="bfloat16", shard_bytes=published_shard_bytes(architecture))
    counts = {subfolder: sum(s.subfolder == subfolder for s in shards) for subfolder in (*SUBFOLDERS, "vae")}
    assert counts == {"transformer": count, "text_encoder": 4, "vae": 1}
    for shard in shards:
        assert shard.bytes - len(shard.header) <= (5 if shard.subfolder == "text_encoder" else 10) * 10**9
    assert shards[-1].bytes == 253_806_966  # the file of the published VAE


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"], dtype="bfloat16", shard_bytes=200_000)
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) > 5
    for file in files:
        assert file.read_bytes() == save(load_file(file), metadata={"format": "pt"}), file


def test_an_index_names_the_file_of_every_tensor() -> None:
    architecture = ARCHITECTURES["tiny"]
    shards = shard_files(architecture, dtype="float32", shard_bytes=lambda _: 200_000)
    indices = index_files(shards)
    assert set(indices) == {
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/model.safetensors.index.json",
    }
    for path, text in indices.items():
        index = json.loads(text)
        assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
        inside = {t.stored: s for s in shards if s.path.startswith(path.partition("/")[0]) for t in s.tensors}
        assert index["weight_map"] == {name: shard.path.partition("/")[2] for name, shard in inside.items()}
        tensors = {tensor for shard in inside.values() for tensor in shard.tensors}
        assert index["metadata"]["total_size"] == sum(4 * math.prod(tensor.shape) for tensor in tensors)
