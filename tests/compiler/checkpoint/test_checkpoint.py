"""Checkpoints: what opens, what is read, what the digest stands for, and one clear error for everything broken."""

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.checkpoint.safetensors import open_component, open_file
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.errors import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)
FILES = {
    "transformer/config.json": {
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "in_channels": 64,
        "joint_attention_dim": 8,
        "axes_dims_rope": [2, 2, 4],
    },
    "text_encoder/config.json": {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 8,
        "vocab_size": 5,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [1, 1, 2]},
        "image_token_id": 4,
        "vision_config": {
            "depth": 1,
            "hidden_size": 8,
            "num_heads": 1,
            "intermediate_size": 8,
            "out_hidden_size": 8,
            "patch_size": 14,
            "fullatt_block_indexes": [0],
        },
    },
    "vae/config.json": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    "scheduler/scheduler_config.json": {"shift": 1.5},
    "processor/preprocessor_config.json": {"patch_size": 14},
    "tokenizer/vocab.json": {"a": 0},
}
TRANSFORMER = {"img_in.weight": np.arange(12).reshape(3, 4).astype(BF16), "img_in.bias": np.arange(3).astype(BF16)}
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "visual.patch_embed.proj.weight": np.ones((2, 3), np.float32),
        "model.embed_tokens.weight": np.full((5, 2), 2, np.float32),
    },
    "model-00002-of-00002.safetensors": {
        "model.layers.0.mlp.up_proj.weight": np.full((4, 2), 3, np.float16),
        "lm_head.weight": np.full((5, 2), 4, np.float32),
    },
}
INDEX = "model.safetensors.index.json"


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_json(folder / INDEX, {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    write_json(root / "model_index.json", {"_class_name": "QwenImageEditPlusPipeline"})
    for name, content in FILES.items():
        write_json(root / name, content)
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    save_file(TRANSFORMER, root / "transformer/diffusion_pytorch_model.safetensors")
    write_shards(root / "text_encoder", SHARDS)
    save_file({"quant_conv.bias": np.zeros(2, np.float32)}, root / "vae/diffusion_pytorch_model.safetensors")
    return root


def test_opens_a_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.name, checkpoint.revision, checkpoint.model.pipeline) == ("model", None, "edit_plus")
    model = checkpoint.model
    assert (model.transformer.layers, model.language.layers, model.vision.depth, model.vae.z_dim) == (2, 3, 1, 16)
    assert (model.scheduler.shift, model.processor.patch_size, model.image_token_id) == (1.5, 14, 4)


def test_pipeline_of_the_single_image_model(folder: Path) -> None:
    write_json(folder / "model_index.json", {"_class_name": "QwenImageEditPipeline"})
    (folder / "processor/preprocessor_config.json").unlink()
    model = open_checkpoint(str(folder)).model
    assert (model.pipeline, model.references_max, model.processor.merge_size) == ("edit", 1, 2)


def test_configs_alone_are_enough_without_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors*"):
        file.unlink()
    assert not open_checkpoint(str(folder), weights=False).complete
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(folder))


def test_reads_tensors_of_every_dtype(folder: Path) -> None:
    tensors = {
        "b": TRANSFORMER["img_in.weight"],
        "f": np.array([[1.5, -2]], np.float32),
        "h": np.array([0.25], np.float16),
        "e4m3": np.array([1, 448], ml_dtypes.float8_e4m3fn),
        "e5m2": np.array([1, -2], ml_dtypes.float8_e5m2),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = folder / "some.safetensors"
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


def test_text_encoder_has_one_name_for_old_and_new_prefixes(folder: Path) -> None:
    reader = open_checkpoint(str(folder)).reader("text_encoder")
    old = {name: reader.read(name).copy() for name in reader.names()}
    new_names = {
        "visual.patch_embed.proj.weight": "model.visual.patch_embed.proj.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
    }
    renamed = {shard: {new_names[name]: t for name, t in tensors.items()} for shard, tensors in SHARDS.items()}
    write_shards(folder / "text_encoder", renamed)
    new = open_checkpoint(str(folder)).reader("text_encoder")
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


def test_both_prefixes_at_once_are_refused(folder: Path) -> None:
    names = ("model.norm.weight", "model.language_model.norm.weight")
    write_shards(folder / "text_encoder", {"model-00001-of-00001.safetensors": {n: np.ones(2) for n in names}})
    with pytest.raises(CheckpointError, match=r"'language_model\.norm\.weight' twice"):
        open_checkpoint(str(folder))


def test_sharded_files_in_the_naming_of_diffusers(tmp_path: Path) -> None:
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(TRANSFORMER, tmp_path / shard)
    save_file({"wrong": np.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": dict.fromkeys(TRANSFORMER, shard)})
    assert set(open_component(tmp_path).names()) == set(TRANSFORMER)


def test_a_missing_tensor_is_named_with_its_file(folder: Path) -> None:
    reader = open_checkpoint(str(folder)).reader("text_encoder")
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


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="leave the revision out"):
        open_checkpoint(str(folder), revision="main")


def test_another_pipeline_names_the_two(folder: Path) -> None:
    write_json(folder / "model_index.json", {"_class_name": "QwenImage21Pipeline"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    for word in ("QwenImage21Pipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        assert word in str(caught.value)


@pytest.mark.parametrize("file", [*list(FILES)[:4], "tokenizer"])
def test_a_missing_component_is_named(folder: Path, file: str) -> None:
    shutil.rmtree(folder / Path(file).parts[0])
    with pytest.raises(CheckpointError, match=rf"lacks {file}.*download the checkpoint again"):
        open_checkpoint(str(folder), weights=False)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\xff"])
@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "processor/preprocessor_config.json"])
def test_a_config_that_is_no_json_object(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{file} .*download it again"):
        open_checkpoint(str(folder), weights=False)


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    write_json(folder / "transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(
        CheckpointError,
        match=r"transformer/config\.json .*quantized checkpoint, expected bfloat16 weights; take the original",
    ):
        open_checkpoint(str(folder))


def cut_tail(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def cut_header(shard: Path) -> None:
    os.truncate(shard, 20)


def cut_all(shard: Path) -> None:
    os.truncate(shard, 3)


def add_tail(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + b"\0")


def delete(shard: Path) -> None:
    shard.unlink()


def no_safetensors(shard: Path) -> None:
    shard.write_text("<html>This page does not exist, and it takes many words to say so</html>")


def other_header(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(shard: Path) -> None:
        content = shard.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        text = json.dumps(edit(header) or header).encode()
        shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    spoil.__name__ = "other_header"
    return spoil


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_tail, f"is cut short, tensor '{UP}'"),
        (cut_header, "is cut short"),
        (cut_all, "is cut short"),
        (add_tail, "has 1 bytes after its last tensor"),
        (delete, "is missing"),
        (no_safetensors, "not a safetensors file"),
        (other_header(lambda h: h[UP].update(shape=[4, 3])), UP),
        (other_header(lambda h: h[UP].update(shape=[-4, -2])), UP),
        (other_header(lambda h: h[UP].update(data_offsets=[0, 16])), "gap or an overlap"),
        (other_header(lambda h: h[UP].update(dtype="F4")), f"tensor '{UP}' has dtype F4"),
        (other_header(lambda h: h[UP].pop("shape") and None), "broken header"),
        (other_header(lambda h: ["a", "list"]), "broken header"),
        (other_header(lambda h: {"renamed": h.pop(UP), **h}), f"has no tensor '{UP}'"),
    ],
)
def test_a_damaged_shard_is_found_on_opening(folder: Path, spoil: Callable[[Path], None], says: str) -> None:
    shard = folder / "text_encoder/model-00002-of-00002.safetensors"
    spoil(shard)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert shard.name in str(caught.value)
    assert says in str(caught.value)
    assert "download" in str(caught.value) or "original" in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, {"a": 1}, {"a": "../model.safetensors"}])
def test_a_damaged_index(folder: Path, weight_map: object) -> None:
    write_json(folder / "text_encoder" / INDEX, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=rf"{INDEX} has no usable weight_map"):
        open_checkpoint(str(folder))


def test_digest_is_of_the_content_alone(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(folder)).digest()
    shutil.copytree(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere/README.md").write_text("no part of the checkpoint")
    assert open_checkpoint(str(tmp_path / "elsewhere")).digest() == first
    assert len(first) == 64
    assert open_checkpoint(str(folder), weights=False).digest() != first


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
    ],
)
def test_digest_sees_every_file(folder: Path, tmp_path: Path, file: str) -> None:
    cache = tmp_path / "digests.json"
    before = open_checkpoint(str(folder)).digest(cache=cache)
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1 if file.endswith(".safetensors") else 0
    (folder / file).write_bytes(bytes(content) + (b"" if file.endswith(".safetensors") else b"\n"))
    assert open_checkpoint(str(folder)).digest(cache=cache) != before


def test_digest_remembers_files_that_did_not_change(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home/digests.json"
    checkpoint = open_checkpoint(str(folder))
    first = checkpoint.digest(cache=cache)
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    known = json.loads(cache.read_text())
    assert known[str(weights.resolve())]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert [file.name for file in cache.parent.iterdir()] == ["digests.json"]

    known[str(weights.resolve())]["sha256"] = "0" * 64
    cache.write_text(json.dumps(known))
    assert checkpoint.digest(cache=cache) != first, "the cache was not used"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert checkpoint.digest(cache=cache) == first, "the cache was used for a touched file"


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"%s": 3}'])
def test_a_damaged_digest_cache_is_ignored(folder: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(content.replace("%s", str((folder / "vae/config.json").resolve())))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.digest(cache=cache) == checkpoint.digest()
    assert json.loads(cache.read_text())


def test_digest_reports_progress(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_checkpoint(str(folder)).digest(progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert done == sorted(done) and done[-1] == size
    assert {call[1] for call in calls} == {size}


COMMIT = "a" * 40


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, offline: snapshots link to blobs, one blob to a shared store."""
    import huggingface_hub.constants as constants

    root = tmp_path / "hub/models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs/main").write_text(COMMIT)
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (root / "blobs" / name).write_bytes(content)
        link = root / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / name, link.parent))
        if file.parent.name == "vae" and large:
            stored = tmp_path / "hub/store/blobs" / ("b" * 64)
            stored.parent.mkdir(parents=True)
            (root / "blobs" / name).rename(stored)
            (root / "blobs" / name).symlink_to(stored)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def test_a_cached_hub_id_opens_offline(hub: Path) -> None:
    checkpoint = open_checkpoint("owner/name")
    assert (checkpoint.name, checkpoint.revision) == ("owner/name", COMMIT)
    assert checkpoint.path == hub / "snapshots" / COMMIT
    np.testing.assert_array_equal(checkpoint.reader("transformer").read("img_in.bias"), [0, 1, 2])
    assert open_checkpoint("owner/name", revision=COMMIT).revision == COMMIT


def test_a_cached_hub_id_opens_when_the_network_fails(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    cached = huggingface_hub.snapshot_download

    def unreachable(*args: object, local_files_only: bool = False, **kwargs: object) -> str:
        if not local_files_only:
            raise RuntimeError("the proxy says no")
        return str(cached(*args, local_files_only=True, **kwargs))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert open_checkpoint("owner/name").revision == COMMIT
    with pytest.raises(CheckpointError, match=r"the proxy says no.*`hf download owner/other`"):
        open_checkpoint("owner/other")


@pytest.mark.parametrize(("source", "revision"), [("owner/other", None), ("owner/name", "v2")])
def test_a_hub_id_that_is_not_cached_names_the_command(hub: Path, source: str, revision: str | None) -> None:
    command = f"hf download {source}" + (f" --revision {revision}" if revision else "")
    with pytest.raises(CheckpointError, match=f"`{command}`"):
        open_checkpoint(source, revision=revision)


def test_a_hub_id_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"huggingface_hub is not installed .*run `pip install 'qie\[compile\]'`"):
        open_checkpoint("owner/name")


def test_a_hub_id_fetches_only_what_is_needed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    published = [
        "README.md",
        "model_index.json",
        "tokenizer/merges.txt",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00005.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model-00001-of-00004.safetensors",
        "text_encoder/model.fp16-00001-of-00004.safetensors",
        "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    taken: list[list[str]] = []

    def record(*args: object, allow_patterns: list[str], **kwargs: object) -> str:
        taken.append(list(filter_repo_objects(published, allow_patterns=allow_patterns)))
        return str(hub / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    open_checkpoint("owner/name", weights=False)
    open_checkpoint("owner/name")
    configs = ["model_index.json", "tokenizer/merges.txt", "transformer/config.json"]
    assert taken[0] == configs
    assert sorted(set(taken[1]) - set(configs)) == [
        "text_encoder/model-00001-of-00004.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00005.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_digest_takes_the_blob_names_of_the_hub(hub: Path, folder: Path) -> None:
    cached, plain = open_checkpoint("owner/name"), open_checkpoint(str(folder))
    assert cached.digest() == plain.digest()
    for name in ("text_encoder/model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        shard = hub / "snapshots" / COMMIT / name
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.resolve().write_bytes(content)
    assert cached.digest() == plain.digest(), "a blob was read although its name is its sha256"


def test_a_link_elsewhere_is_not_taken_for_a_blob(folder: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(folder)).digest()
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / "blobs").mkdir()
    weights.rename(tmp_path / "blobs" / ("c" * 64))
    weights.symlink_to(tmp_path / "blobs" / ("c" * 64))
    assert open_checkpoint(str(folder)).digest() == before


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
