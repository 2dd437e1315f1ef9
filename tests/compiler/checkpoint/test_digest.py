"""What the digest of a checkpoint stands for, and what it remembers."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint


def test_digest_is_of_the_content_alone(small_checkpoint: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(small_checkpoint)).digest()
    shutil.copytree(small_checkpoint, tmp_path / "elsewhere")
    (tmp_path / "elsewhere/README.md").write_text("no part of the checkpoint")
    assert open_checkpoint(str(tmp_path / "elsewhere")).digest() == first
    assert len(first) == 64
    assert open_checkpoint(str(small_checkpoint), weights=False).digest() != first


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
def test_digest_sees_every_file(small_checkpoint: Path, tmp_path: Path, file: str) -> None:
    cache = tmp_path / "digests.json"
    before = open_checkpoint(str(small_checkpoint)).digest(cache=cache)
    content = bytearray((small_checkpoint / file).read_bytes())
    content[-1] ^= 1 if file.endswith(".safetensors") else 0
    (small_checkpoint / file).write_bytes(bytes(content) + (b"" if file.endswith(".safetensors") else b"\n"))
    assert open_checkpoint(str(small_checkpoint)).digest(cache=cache) != before


def test_digest_remembers_files_that_did_not_change(small_checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home/digests.json"
    checkpoint = open_checkpoint(str(small_checkpoint))
    first = checkpoint.digest(cache=cache)
    weights = small_checkpoint / "transformer/diffusion_pytorch_model.safetensors"
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
def test_a_damaged_digest_cache_is_ignored(small_checkpoint: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "digests.json"
    cache.write_text(content.replace("%s", str((small_checkpoint / "vae/config.json").resolve())))
    checkpoint = open_checkpoint(str(small_checkpoint))
    assert checkpoint.digest(cache=cache) == checkpoint.digest()
    assert json.loads(cache.read_text())


def test_digest_reports_progress(small_checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_checkpoint(str(small_checkpoint)).digest(progress=lambda done, total: calls.append((done, total)))
    done = [call[0] for call in calls]
    size = sum(file.stat().st_size for file in small_checkpoint.rglob("*") if file.is_file())
    assert done == sorted(done) and done[-1] == size
    assert {call[1] for call in calls} == {size}


def test_a_link_elsewhere_is_not_taken_for_a_blob(small_checkpoint: Path, tmp_path: Path) -> None:
    before = open_checkpoint(str(small_checkpoint)).digest()
    weights = small_checkpoint / "transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / "blobs").mkdir()
    weights.rename(tmp_path / "blobs" / ("c" * 64))
    weights.symlink_to(tmp_path / "blobs" / ("c" * 64))
    assert open_checkpoint(str(small_checkpoint)).digest() == before
