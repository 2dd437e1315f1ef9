"""Reading of tensors: a disk that fails, and files that change before, while and after a tensor is read."""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import qie.compiler.checkpoint.safetensors as module
from qie.compiler.checkpoint.lora import fused_reader, open_lora
from qie.compiler.checkpoint.safetensors import SafetensorsReader, open_file, open_subfolder
from qie.compiler.checkpoint.scaled import scaled_reader
from qie.compiler.quantization.smoothing import smoothed_reader
from qie.engines.errors import CheckpointError
from tests.support.checkpoints import write_shards

TENSORS = {"a": np.arange(1000, dtype=np.float32), "b": np.arange(50, dtype=np.float32)}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SafetensorsReader:
    """Of a tensor that is read in several pieces, and a short one."""
    monkeypatch.setattr(module, "_READ", 512)
    save_file(TENSORS, tmp_path / "model.safetensors")
    os.utime(tmp_path / "model.safetensors", (1, 1))  # the clock of a file system is coarse
    return open_file(tmp_path / "model.safetensors")


def on_read(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Call ``action`` before piece ``number`` is read."""
    preadv, calls = os.preadv, []

    def read(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        calls.append(offset)
        if len(calls) == number:
            action()
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


def test_a_read_error_in_the_middle_names_the_file(reader: SafetensorsReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_read(monkeypatch, 3, fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .Input/output error.; download"):
        reader.read("a")
    assert np.array_equal(reader.read("a"), TENSORS["a"])


def test_a_shard_that_is_gone(reader: SafetensorsReader) -> None:
    reader.source.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .No such file"):
        reader.read("a")


def truncated(path: Path) -> None:
    os.truncate(path, 2000)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1" * 4)


def replaced(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [truncated, rewritten, replaced])
@pytest.mark.parametrize("piece", [1, 4, 8])
def test_a_shard_that_changes_while_a_tensor_is_read(
    reader: SafetensorsReader, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], piece: int
) -> None:
    on_read(monkeypatch, piece, lambda: change(reader.source))
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed while it was read; start again"):
        reader.read("a")
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        reader.read("b")


def test_a_tensor_outlives_its_file(reader: SafetensorsReader) -> None:
    tensor = reader.read("a")
    truncated(reader.source)
    assert np.array_equal(tensor, TENSORS["a"])


def test_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    """Whatever the order of the index and of the names is."""
    one = np.ones(1, np.float32)
    write_shards(tmp_path, {"model-00002-of-00002.safetensors": {"a": one, "d": one},
                            "model-00001-of-00002.safetensors": {"c": one, "b": one.astype(np.float64)}})  # fmt: skip
    reader = open_subfolder(tmp_path)
    stored = sorted("bc", key=lambda name: reader.tensors[name].offset)
    assert reader.order(["d", "a", "c", "b", "a"]) == (*stored, "a", "d")
    assert reader.order([]) == ()
    with pytest.raises(CheckpointError, match="no tensor 'e'"):
        reader.order(["a", "e"])


def test_wrapped_readers_have_the_order_of_the_files(tmp_path: Path) -> None:
    pair = {"l.lora_A.weight": np.ones((1, 3), np.float32), "l.lora_B.weight": np.ones((2, 1), np.float32)}
    save_file(pair, tmp_path / "lora.safetensors")
    save_file({"l.weight": np.ones((2, 3), np.float32), "k": np.ones(1, np.float64)}, tmp_path / "a.safetensors")
    reader = open_file(tmp_path / "a.safetensors")
    wrapped = fused_reader(scaled_reader(reader), [open_lora(tmp_path / "lora.safetensors", 1.0)])
    wrapped = smoothed_reader(wrapped, (), {})
    assert wrapped.order(["l.weight", "k"]) == reader.order(["k", "l.weight"])
