"""External data: right bytes at right places, nothing half-written, all problems found before the first byte."""

import errno
import hashlib
import os
import shutil
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qie.compiler.weights.placed_file as placed_file
import qie.compiler.weights.stream as module
import qie.compiler.weights.weights_file as weights_file
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.prepare import prepare
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.errors import BuildError, CheckpointError
from tests.support.tensors import Tensors, draw, weight

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_layouts() -> None:
    matrix = draw(3, 4)
    assert np.array_equal(prepare(weight("w", 4, 3, layout=("transpose",)), matrix), matrix.T)
    kernel = draw(5, 4, 3, 2, 2)
    assert np.array_equal(prepare(weight("w", 5, 4, 2, 2, layout=("last_frame",)), kernel), kernel[:, :, 2])
    patches = draw(6, 3, 2, 2, 2)
    flat = prepare(weight("w", 24, 6, layout=("flatten", "transpose")), patches)
    assert np.array_equal(flat, patches.reshape(6, 24).T)
    assert flat.flags.c_contiguous


def nearest_even(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, by the bits: half of the last kept place rounds to the even neighbour."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("raw", [np.float32, np.float16, BF16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_casts_round_to_nearest_even(raw: Any) -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 2**-130, 3e38, 0.0, -0.0], np.float32)
    values = (np.concatenate([ties, draw(4000)]) if raw == np.float32 else draw(4000)).astype(raw)
    bf16 = prepare(weight("w", values.size, dtype="bfloat16"), values)
    assert bf16.dtype == BF16
    assert np.array_equal(bf16.view(np.uint16), nearest_even(values))
    exact = prepare(weight("w", values.size), values)
    assert exact.dtype == np.float32 and np.array_equal(exact, values.astype(np.float32))


def test_the_file_holds_every_tensor_at_its_entry(tmp_path: Path) -> None:
    tensors = {
        "small": draw(3),
        "large": draw(40, 30, dtype=BF16),
        "scalar": np.array(2.5, np.float32),
        "page": draw(1024),
        "gamma": draw(6, 1, 1, 1),
    }
    weights = [
        weight("small", 3),
        weight("large", 30, 40, layout=("transpose",)),
        weight("scalar", 1, dtype="bfloat16"),
        weight("page", 1024),
        weight("gamma", 6, dtype="bfloat16", subfolder="vae"),
    ]
    readers: dict[Subfolder, Any] = {"transformer": Tensors(tensors), "vae": Tensors(tensors)}
    calls: list[tuple[int, int]] = []
    path = tmp_path / "model.onnx.data"
    written = write_weights(weights, readers, path, progress=lambda done, total: calls.append((done, total)))

    content = path.read_bytes()
    assert written.path == path
    assert written.bytes == len(content) == total_bytes(weights)
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert [entry.name for entry in written.entries] == [w.name for w in weights]
    end = 0
    for w, entry in zip(weights, written.entries, strict=True):
        assert entry.offset % (4096 if entry.length >= 4096 else 64) == 0
        assert entry.offset >= end and not any(content[end : entry.offset])
        end = entry.offset + entry.length
        assert content[entry.offset : end] == prepare(w, tensors[w.name]).tobytes()
    assert calls[-1] == (len(content), len(content))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx.data"]


def test_no_weights_make_an_empty_file(tmp_path: Path) -> None:
    written = write_weights([], {}, tmp_path / "data")
    assert (written.bytes, written.entries) == (0, ())
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        ((4, 3), {"shape": (3, 4)}),
        ((3, 4), {"shape": (3, 4), "layout": ("transpose",)}),
        ((3, 5), {"shape": (3, 4)}),
        ((12,), {"shape": (3, 4), "layout": ("transpose",)}),
        ((2, 3, 4), {"shape": (4, 6), "layout": ("transpose",)}),
        ((5, 4, 2, 2), {"shape": (5, 4, 2, 2), "layout": ("last_frame",)}),
        ((4, 5, 3, 2, 2), {"shape": (5, 4, 2, 2), "layout": ("last_frame",)}),
        ((6, 3, 4), {"shape": (6, 13), "layout": ("flatten",)}),
        ((), {"shape": (4,)}),
    ],
)
def test_another_shape(tmp_path: Path, raw: tuple[int, ...], fields: dict[str, Any]) -> None:
    wrong = replace(weight("block.to_q.weight"), **fields)
    says = r"transformer tensor 'block\.to_q\.weight' has shape \["
    with pytest.raises(CheckpointError, match=says):
        prepare(wrong, np.zeros(raw, np.float32))
    reader = Tensors({wrong.name: np.zeros(raw, np.float32)})
    with pytest.raises(CheckpointError, match=says):
        write_weights([wrong], {"transformer": reader}, tmp_path / "data")
    assert reader.reads == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("raw", [(6, 1, 1, 1), (2, 3), (1, 6)])
def test_axes_may_be_split_and_merged(raw: tuple[int, ...]) -> None:
    values = np.arange(6, dtype=np.float32)
    assert prepare(weight("w", 6), values.reshape(raw)).tolist() == values.tolist()
    assert prepare(weight("w", *raw), values).shape == raw


def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    reader = Tensors({"w": np.zeros(4, np.int8)})
    with pytest.raises(CheckpointError, match="'w' is int8, expected one of float64, float32"):
        write_weights([weight("w", 4)], {"transformer": reader}, tmp_path / "data")


def test_all_problems_are_found_before_anything_is_read(tmp_path: Path) -> None:
    reader = Tensors({"good": draw(4), "bad": draw(3)})
    weights = [weight("good", 4), weight("bad", 4), *(weight(f"absent{i}", 4) for i in range(7))]
    with pytest.raises(CheckpointError) as caught:
        write_weights(weights, {"transformer": reader}, tmp_path / "data")
    text = str(caught.value)
    assert "transformer tensor 'bad' has shape [3], expected [4]" in text
    assert "'absent3' is missing" in text and "absent4" not in text and "and 3 more" in text
    assert "; download the checkpoint again" in text
    assert reader.reads == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("raw", [np.float32, BF16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elements_that_are_not_finite(tmp_path: Path, value: float, raw: Any, dtype: str) -> None:
    broken = draw(50)
    broken[31] = value
    tensors = {"fine": draw(2000), "broken": broken.astype(raw)}
    (tmp_path / "data").write_text("what was there before")
    with pytest.raises(CheckpointError, match=r"transformer tensor 'broken' .*infinite"):
        weights = [weight("fine", 2000), weight("broken", 50, dtype=dtype)]
        write_weights(weights, {"transformer": Tensors(tensors)}, tmp_path / "data")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("data", "what was there before")]


def test_a_finite_value_beyond_bfloat16() -> None:
    with pytest.raises(CheckpointError, match="infinite or NaN elements in bfloat16"):
        prepare(weight("w", 1, dtype="bfloat16"), np.array([3.4e38], np.float32))


def test_too_little_room_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    reader = Tensors({"w": draw(1000)})
    with pytest.raises(BuildError, match=r"data needs 4,000 bytes, and 1,234 are free .*make room"):
        write_weights([weight("w", 1000)], {"transformer": reader}, tmp_path / "data")
    assert reader.reads == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "data").write_text("what was there before")
    with pytest.raises(BuildError, match=r"data needs 4,000 bytes, and [\d,]+ are free"):
        write_weights([weight("w", 1000)], {"transformer": Tensors({"w": draw(1000)})}, tmp_path / "data")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("data", "what was there before")]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_in_any_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Also in those of other threads; room is reserved before anything is read."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(placed_file, "SYNCED_BYTES", 400_000)  # once, after the last piece
    monkeypatch.setattr(os, call, full)
    reader, before = Tensors({"w": draw(100_000)}), threading.active_count()
    with pytest.raises(BuildError, match=r"data needs 400,000 bytes, and [\d,]+ are free \(No space left on device\)"):
        write_weights([weight("w", 100_000)], {"transformer": reader}, tmp_path / "data")
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before
    assert (reader.reads == 0) == (call == "posix_fallocate")


def test_a_file_system_that_reserves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_weights([weight("w", 10)], {"transformer": Tensors({"w": draw(10)})}, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == draw(10).tobytes()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file/data", tmp_path / "nothing/data"):
        with pytest.raises(BuildError, match="cannot be written"):
            write_weights([weight("w", 4)], {"transformer": Tensors({"w": draw(4)})}, path)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 1000)

    def interrupt(done: int, _: int) -> None:
        if done > 2000:
            assert [file.name for file in tmp_path.iterdir()] == ["data.part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader = Tensors({"w": draw(1000)})
        write_weights([weight("w", 1000)], {"transformer": reader}, tmp_path / "data", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_few_tensors_at_a_time_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is converted, what was read ahead, and what waits to be written."""
    monkeypatch.setattr(module, "AHEAD_BYTES", 1_000_000)
    monkeypatch.setattr(placed_file, "QUEUED_BYTES", 1_000_000)
    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 500_000)

    class Zeros(Tensors):
        def read(self, name: str) -> np.ndarray:
            return np.zeros(self.tensors[name].shape, BF16)

    shapes = {f"w{number}": np.broadcast_to(np.zeros(1, BF16), (500, 1000)) for number in range(12)}
    weights = [weight(name, 1000, 500, layout=("transpose",)) for name in shapes]
    tracemalloc.start()
    try:
        write_weights(weights, {"transformer": Zeros(shapes)}, tmp_path / "data")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total_bytes(weights) / 2


def test_what_a_killed_build_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "data.part").write_bytes(bytes(100_000))
    write_weights([weight("w", 10)], {"transformer": Tensors({"w": draw(10)})}, tmp_path / "data")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("data", draw(10).tobytes())]


def test_pieces_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, readers = [weight("w", 3000, dtype="bfloat16")], {"transformer": Tensors({"w": draw(3000)})}
    whole = write_weights(weights, readers, tmp_path / "whole")
    monkeypatch.setattr(weights_file, "CHUNK_BYTES", 1000)
    calls: list[int] = []
    pieces = write_weights(weights, readers, tmp_path / "pieces", progress=lambda done, _: calls.append(done))
    assert calls == [0, 1000, 2000, 3000, 4000, 5000, 6000]
    assert pieces.sha256 == whole.sha256
