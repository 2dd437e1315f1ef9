"""Checkpoints of the hub: offline, fetched in part, and what a failed download says."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.engines.errors import CheckpointError
from tests.support.hub import COMMIT, HUB_ID, FakeHub


@pytest.fixture
def hub(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, offline: snapshots link to blobs, one blob to a shared store."""
    import huggingface_hub.constants as constants

    root = tmp_path / "hub/models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs/main").write_text(COMMIT)
    for file in [f for f in small_checkpoint.rglob("*") if f.is_file()]:
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (root / "blobs" / name).write_bytes(content)
        link = root / "snapshots" / COMMIT / file.relative_to(small_checkpoint)
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


def test_weights_that_cannot_be_downloaded_say_why(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    checkpoint = open_checkpoint("owner/name", weights=False)
    (checkpoint.path / "vae/diffusion_pytorch_model.safetensors").unlink()

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"not complete in the cache .*No space left on device.*; check"):
        checkpoint.with_weights()


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
    vae = hub / "snapshots" / COMMIT / "vae" / "diffusion_pytorch_model.safetensors"
    vae.unlink()
    checkpoint = open_checkpoint("owner/name", weights=False)
    assert taken == [["model_index.json", "tokenizer/merges.txt", "transformer/config.json"]]
    with pytest.raises(CheckpointError, match="vae"):  # nothing was really downloaded
        checkpoint.with_weights()
    assert sorted(taken[1]) == [
        "text_encoder/model-00001-of-00004.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00005.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_cached_weights_are_not_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("owner/name", weights=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    assert checkpoint.missing_bytes() == 0
    assert not checkpoint.complete
    assert checkpoint.with_weights().complete


@pytest.fixture
def fake_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(checkpoint, tmp_path / "cache", monkeypatch)


def test_weights_are_those_of_the_commit_of_the_configs(fake_hub: FakeHub) -> None:
    checkpoint = open_checkpoint(HUB_ID, revision="main", weights=False)
    assert not any((fake_hub.snapshot / file).exists() for file in fake_hub.weight_files)
    checkpoint.with_weights()
    downloads = [call for call in fake_hub.calls if call[0] != "sizes"]
    assert downloads == [("configs", "main"), ("weights", COMMIT)]


def test_missing_bytes_are_those_that_the_cache_lacks(fake_hub: FakeHub, checkpoint: Path) -> None:
    opened = open_checkpoint(HUB_ID, weights=False)
    sizes = {file: (checkpoint / file).stat().st_size for file in fake_hub.weight_files}
    assert opened.missing_bytes() == sum(sizes.values())
    cached = fake_hub.weight_files[0]
    shutil.copyfile(checkpoint / cached, fake_hub.snapshot / cached)
    assert opened.missing_bytes() == sum(sizes.values()) - sizes[cached]
    fake_hub.online = False
    assert opened.missing_bytes() is None
    assert open_checkpoint(str(checkpoint), weights=False).missing_bytes() == 0


def test_a_download_reports_its_bytes(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qie.compiler.checkpoint.hub.WATCH_SECONDS", 0.001)
    checkpoint, calls = open_checkpoint(HUB_ID, weights=False), []
    total = checkpoint.missing_bytes()
    checkpoint.with_weights(progress=lambda *call: calls.append(call))
    assert calls[-1] == (total, total)
    assert {call[1] for call in calls} == {total}
    done = [call[0] for call in calls]
    assert done == sorted(done)


def test_digest_takes_the_blob_names_of_the_hub(hub: Path, small_checkpoint: Path) -> None:
    cached, plain = open_checkpoint("owner/name"), open_checkpoint(str(small_checkpoint))
    assert cached.digest() == plain.digest()
    for name in ("text_encoder/model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        shard = hub / "snapshots" / COMMIT / name
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.resolve().write_bytes(content)
    assert cached.digest() == plain.digest(), "a blob was read although its name is its sha256"
