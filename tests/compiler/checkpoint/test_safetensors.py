"""Safetensors files: what one file and one JSON file hold, and the headers that are refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.safetensors import WrappedReader, open_file, open_subfolder, read_json
from qie.engines.errors import CheckpointError
from tests.support.checkpoints import write_shards

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, content: bytes = bytes(8)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_a_file_of_the_library(tmp_path: Path) -> None:
    """A scalar and an empty tensor too, and the metadata beside them."""
    tensors = {
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.int64),
        "matrix": np.arange(6, dtype=np.int16).reshape(2, 3),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"alpha": "8"})
    reader = open_file(tmp_path / "a.safetensors")
    assert reader.metadata == {"alpha": "8"}
    assert reader.files == (tmp_path / "a.safetensors",)
    assert set(reader.names()) == set(tensors)
    for name, expected in tensors.items():
        assert (reader.shape(name), reader.dtype(name)) == (expected.shape, expected.dtype.name)
        assert reader.read(name).shape == expected.shape
        assert np.array_equal(reader.read(name), expected)


def test_a_tensor_is_a_read_only_view(tmp_path: Path) -> None:
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "a.safetensors")
    tensor = open_file(tmp_path / "a.safetensors").read("a")
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 2


def test_stored_names_become_canonical(tmp_path: Path) -> None:
    save_file({"old.a": np.ones(1, np.float32), "old.b": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    reader = open_file(tmp_path / "a.safetensors", lambda name: name.removeprefix("old."))
    assert set(reader.names()) == {"a", "b"}
    assert reader.read("a").tolist() == [1.0]
    with pytest.raises(CheckpointError, match="no tensor 'old.a'"):
        reader.read("old.a")


def test_a_wrapped_reader_passes_everything_through(tmp_path: Path) -> None:
    save_file({"a": np.ones((2, 1), np.float16)}, tmp_path / "a.safetensors")
    reader = open_file(tmp_path / "a.safetensors")
    wrapped = WrappedReader(reader=reader)
    assert (wrapped.names(), wrapped.shape("a"), wrapped.dtype("a")) == (("a",), (2, 1), "float16")
    assert np.array_equal(wrapped.read("a"), reader.read("a"))


def test_an_index_comes_before_a_single_file(tmp_path: Path) -> None:
    save_file({"single": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert open_subfolder(tmp_path).names() == ("single",)
    write_shards(tmp_path, {"model-00001-of-00001.safetensors": {"shard": np.ones(1, np.float32)}})
    assert open_subfolder(tmp_path).names() == ("shard",)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights, expected diffusion_pytorch_model\.safetensors"):
        open_subfolder(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": ENTRY | {"shape": [True, 2]}}, "broken header"),
        ({"a": ENTRY | {"shape": [2.0]}}, "broken header"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "broken header"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "gap or an overlap at tensor 'a'"),
        ({"a": ENTRY, "b": ENTRY}, "gap or an overlap at tensor 'b'"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, "cut short, tensor 'b' ends at byte"),
        ({}, "has 8 bytes after its last tensor"),
    ],
)
def test_a_header_that_does_not_fit_its_file(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    assert open_file(write(tmp_path / "good.safetensors", {"a": ENTRY})).names() == ("a",)
    with pytest.raises(CheckpointError, match=message):
        open_file(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [0, 1, 1 << 63])
def test_a_length_that_no_header_has(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(8))
    with pytest.raises(CheckpointError, match=f"cut short or not a safetensors file .18 bytes, header of {length}."):
        open_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read .No such file"):
        open_file(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a JSON list, expected an object"),
        ("{", "is not JSON"),
        (f'{{"a": {"9" * 301}}}', "is not JSON .a number of 301 digits."),
        (b'{"a": "\xff"}', "is not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_json_with_a_long_number(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"a": {"9" * 300}}}')
    assert read_json(tmp_path / "config.json") == {"a": 10**300 - 1}
