"""Damaged shards and indexes are found when the checkpoint is opened."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.engines.errors import CheckpointError
from tests.support.checkpoints import INDEX, write_json


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
def test_a_damaged_shard_is_found_on_opening(small_checkpoint: Path, spoil: Callable[[Path], None], says: str) -> None:
    shard = small_checkpoint / "text_encoder/model-00002-of-00002.safetensors"
    spoil(shard)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(small_checkpoint))
    assert shard.name in str(caught.value)
    assert says in str(caught.value)
    assert "download" in str(caught.value) or "original" in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, {"a": 1}, {"a": "../model.safetensors"}])
def test_a_damaged_index(small_checkpoint: Path, weight_map: object) -> None:
    write_json(small_checkpoint / "text_encoder" / INDEX, {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=rf"{INDEX} has no usable weight_map"):
        open_checkpoint(str(small_checkpoint))
