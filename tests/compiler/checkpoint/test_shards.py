"""Weights that are fetched one shard at a time: equal to a folder, one shard on the disk, wrong sources refused."""

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.checkpoint.shards import Shard, TensorFacts
from qie.compiler.checkpoint.subfolders import SUBFOLDERS
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.errors import BuildError, CheckpointError
from qie.engines.files import sha256_of
from qie.engines.progress import StageProgress


class FolderShards:
    """The shards of a folder, fetched by copying them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        files = sorted(folder.rglob("*.safetensors"))
        self.shards = {
            file.relative_to(folder).as_posix(): Shard(bytes=file.stat().st_size, sha256=sha256_of(file))
            for file in files
        }

    def tensors(self, path: str) -> Mapping[str, TensorFacts]:
        reader = open_file(self.folder / path)
        return {name: TensorFacts(dtype=reader.dtype(name), shape=reader.shape(name)) for name in reader.names()}

    def fetch(self, path: str, target: Path, *, progress: StageProgress) -> None:
        self.fetched.append(path)
        shutil.copyfile(self.folder / path, target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    return write_checkpoint(
        tmp_path_factory.mktemp("shards") / "tiny", ARCHITECTURES["tiny"], dtype="bfloat16", shard_bytes=200_000
    )


@pytest.fixture
def source(folder: Path) -> FolderShards:
    return FolderShards(folder)


@pytest.fixture
def streamed(folder: Path, source: FolderShards, tmp_path: Path) -> Checkpoint:
    """The same checkpoint in a folder without weights."""
    configs = shutil.copytree(folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    return open_checkpoint(str(configs), weights=False).streamed(source, tmp_path / "shard")


def test_every_tensor_equals_the_folders_and_every_shard_is_fetched_once(
    folder: Path, source: FolderShards, streamed: Checkpoint, tmp_path: Path
) -> None:
    whole = open_checkpoint(str(folder))
    assert source.fetched == []
    for subfolder in SUBFOLDERS:
        reader, expected = streamed.readers()[subfolder], whole.readers()[subfolder]
        assert set(reader.names()) == set(expected.names())
        for name in reader.names():
            assert (reader.shape(name), reader.dtype(name)) == (expected.shape(name), expected.dtype(name))
            np.testing.assert_array_equal(reader.read(name), expected.read(name))
            assert len([file for file in (tmp_path / "shard").rglob("*") if file.is_file()]) == 1
    assert sorted(source.fetched) == sorted(source.shards) and len(source.fetched) > 5
    assert streamed.fetched is not None
    streamed.fetched.close()
    assert not (tmp_path / "shard").exists()


def test_the_digest_is_that_of_the_folder_and_fetches_nothing(
    folder: Path, source: FolderShards, streamed: Checkpoint
) -> None:
    assert streamed.digest() == open_checkpoint(str(folder)).digest()
    assert source.fetched == []
    streamed.check_layers()


def test_a_shard_that_is_another_one_is_refused(source: FolderShards, streamed: Checkpoint) -> None:
    path = "vae/diffusion_pytorch_model.safetensors"
    source.shards[path] = Shard(bytes=source.shards[path].bytes, sha256="0" * 64)
    reader = streamed.readers()["vae"]
    with pytest.raises(CheckpointError, match=r"vae/.* has the sha256 [0-9a-f]{12}, expected 000000000000; start"):
        reader.read(reader.names()[0])


def test_a_source_without_a_shard_of_the_index_is_refused(
    source: FolderShards, streamed: Checkpoint, tmp_path: Path
) -> None:
    del source.shards[next(path for path in source.shards if path.startswith("transformer/"))]
    with pytest.raises(CheckpointError, match="is in the index, and not where the weights come from; check the model"):
        open_checkpoint(str(streamed.path), weights=False).streamed(source, tmp_path / "other")


def test_a_full_disk_is_named(source: FolderShards, streamed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, target: Path, *, progress: StageProgress) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(source, "fetch", full)
    reader = streamed.readers()["vae"]
    with pytest.raises(BuildError, match=r"the disk of .* is full, vae/.* has [\d,]+ bytes; free some space"):
        reader.read(reader.names()[0])


def test_too_little_room_is_found_before_a_shard_is_fetched(
    source: FolderShards, streamed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(streamed.path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    reader = streamed.readers()["vae"]
    with pytest.raises(BuildError, match=r"has [\d,]+ bytes, and 10 are free in .*; free some space"):
        reader.read(reader.names()[0])
    assert source.fetched == []
