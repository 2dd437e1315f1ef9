"""Configs, weights, tokenizers and calibrations that lie: each is planned and built within bounds, or one error."""

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.resolve import plan_build
from qie.compiler.quantization.calibration import read_calibration
from qie.engines.errors import CalibrationError, CheckpointError, QieError
from tests.support.bundles import build
from tests.support.damage import change_json
from tests.support.soak import spread

EXTREMES: list[Any] = [0, -1, 7, 10**6, 10**18, 10**400, 1e300, 1e-300, -0.5, float("nan"), float("inf"), "x", "\ud800",
                       "x" * 100_000, None, [], {}, True, [[]], {"a": {}}]  # fmt: skip

CONFIGS = ("model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json",
           "scheduler/scheduler_config.json", "processor/preprocessor_config.json")  # fmt: skip


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, list) and value:
        yield place
        yield from leaves(value[0], (*place, 0))
    else:
        yield place


def test_every_leaf_of_every_config_with_every_extreme(bad_checkpoint: Path) -> None:
    """Planned, or refused; never longer than a plan takes."""
    cases = []
    for name in CONFIGS:
        data = json.loads((bad_checkpoint / name).read_text())
        cases += [(name, place, value) for place in leaves(data) for value in EXTREMES]
    assert len(cases) > 1000
    refused = 0
    for name, place, value in spread(cases, 50):
        path = bad_checkpoint / name
        text = path.read_text()
        data = json.loads(text)
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        path.write_text(json.dumps(data))
        try:
            estimate(plan_build(bad_checkpoint))
        except QieError as problem:
            refused += 1
            str(problem).encode()
        path.write_text(text)
    assert refused > 25
    plan_build(bad_checkpoint)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "{" + " " * (1 << 26) + "}", '{"a": 1e400}x', "\0", ""]
)
def test_json_that_is_none(bad_checkpoint: Path, name: str, text: str) -> None:
    (bad_checkpoint / name).write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(bad_checkpoint), weights=False)


@pytest.mark.parametrize(
    ("name", "key", "count"), [("transformer", "num_layers", 1), ("transformer", "num_layers", 3),
                               ("transformer", "num_layers", 1000), ("text_encoder", "num_hidden_layers", 1)],
)  # fmt: skip
def test_layers_that_the_weights_do_not_have(bad_checkpoint: Path, name: str, key: str, count: int) -> None:
    config = json.loads((bad_checkpoint / name / "config.json").read_text())
    for inner in (config, config.get("text_config", {})):
        if key in inner:
            inner[key] = count
    (bad_checkpoint / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"says {key} = {count}, and the weights have \d+ of .*; take both from"):
        plan_build(bad_checkpoint)


def header(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 50_000, b"5", b"[]", b'"x"', b"{}x", b'{"a": 5}', b'{"a": {}}',
     b'{"a": {"dtype": "F32"}}',
     b'{"__metadata__": 5}', b'{"__metadata__": {"a": 5}}', b'{"__metadata__": []}',
     b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [' + b"9," * 70 + b'9], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": {"x": 1}}}',
     b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
     b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"\xff\xfe", b"\0\0"],
    ids=range(23),
)  # fmt: skip
def test_headers_that_lie(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointError):
        open_file(header(tmp_path / "x.safetensors", text, b"1234"))


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 99_000_000, 2**63 - 1, 2**64 - 1])
def test_lengths_that_lie(tmp_path: Path, length: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "weight_map", [{"a": ""}, {"a": "."}, {"a": ".."}, {"a": "a/b"}, {"a": "/etc/passwd"}, {"a": "x\0"}, {"a": 5}, [],
                   5,
                   {"a": None}, {"a": "missing.safetensors"}, {"a": "x" * 300}], ids=range(12),
)  # fmt: skip
def test_an_index_that_lies(bad_checkpoint: Path, weight_map: Any) -> None:
    path = bad_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(bad_checkpoint))


@pytest.mark.parametrize("kind", ["folder", "FIFO", "loop"])
@pytest.mark.parametrize(
    "name", [*CONFIGS[:4], "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_what_is_no_file(bad_checkpoint: Path, name: str, kind: str) -> None:
    path = bad_checkpoint / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(bad_checkpoint))


# Tokenizers


@pytest.fixture
def tokenizer_file(bad_checkpoint: Path) -> Path:
    """The tokenizer of a checkpoint in one file, which may be damaged."""
    path = bad_checkpoint / "tokenizer" / "tokenizer.json"
    load_tokenizer(bad_checkpoint).save(str(path))
    return path


def bomb(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 1000)] * 3)


def regex(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Split("(a+)+b", "isolated")


def lower(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def none(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = None


@pytest.mark.parametrize("change", [bomb, regex, lower, none])
def test_a_tokenizer_that_does_something_else(
    bad_checkpoint: Path, tokenizer_file: Path, change: Callable[[Tokenizer], None]
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    change(tokenizer)
    tokenizer.save(str(tokenizer_file))
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json is not a tokenizer of Qwen \(its (normalizer|pre-token)"
    ):
        load_tokenizer(bad_checkpoint)


@pytest.mark.parametrize(
    "change", [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}, {"unk_token": "a"},
               {"dropout": 0.5}, {"ignore_merges": True}, {"byte_fallback": True},
               {"type": "WordLevel", "unk_token": "a"}], ids=str,
)  # fmt: skip
def test_a_tokenizer_of_another_model(bad_checkpoint: Path, tokenizer_file: Path, change: dict[str, Any]) -> None:
    data = json.loads(tokenizer_file.read_text())
    tokenizer_file.write_text(json.dumps(data | {"model": data["model"] | change}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not a tokenizer of Qwen"):
        load_tokenizer(bad_checkpoint)


def test_a_post_processor_that_repeats(bad_checkpoint: Path, tokenizer_file: Path) -> None:
    repeated = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000, "pair": [],
                "special_tokens": {}}  # fmt: skip
    change_json(tokenizer_file, post_processor=repeated)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not a tokenizer of Qwen"):
        load_tokenizer(bad_checkpoint)


def test_a_pipe_as_lora(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is no file, but a folder, pipe or device"):
        open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("entry", [{"state": [1], "sha256": "\ud800"}, {"state": "x"}, 5, [], {"sha256": "0" * 64}])
def test_a_cache_of_digests_that_lies(checkpoint: Path, tmp_path: Path, entry: Any) -> None:
    opened = open_checkpoint(str(checkpoint))
    wanted, cache = opened.digest(), tmp_path / "digests.json"
    opened.digest(cache=cache)
    known = json.loads(cache.read_text())
    for name, remembered in known.items():
        lie = entry | {"state": remembered["state"]} if isinstance(entry, dict) and "sha256" in entry else entry
        cache.write_text(json.dumps(known | {name: lie, "x" * 5000: remembered}))
        if entry == {"sha256": "0" * 64}:
            continue  # whoever writes there may write bundles too
        assert opened.digest(cache=cache) == wanted


def test_padding_and_truncation_of_a_tokenizer_are_not_used(bad_checkpoint: Path, tokenizer_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding(length=10**9)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tokenizer_file))
    assert 1 < len(load_tokenizer(bad_checkpoint).encode("make it red").ids) < 20


@pytest.mark.parametrize(
    "change",
    [{"truncation": 5}, {"model": {"type": "BPE"}}, {"model": 5}, {"added_tokens": 5}, {"version": 9}],
    ids=str,
)
def test_a_tokenizer_that_is_none(bad_checkpoint: Path, tokenizer_file: Path, change: dict[str, Any]) -> None:
    change_json(tokenizer_file, **change)
    with pytest.raises(CheckpointError):
        load_tokenizer(bad_checkpoint)


# Calibrations


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def array(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def about(**changes: Any) -> bytes:
    files = members(POCKET / "calibration.npz")
    data = json.loads(np.load(io.BytesIO(files["about.npy"])).tobytes()) | changes
    return array(np.frombuffer(json.dumps(data).encode(), np.uint8))


CALIBRATIONS: dict[str, dict[str, bytes]] = {
    "model is a number": {"about.npy": about(model=5)},
    "samples is text": {"about.npy": about(samples="many")},
    "samples is huge": {"about.npy": about(samples=10**400)},
    "alphas is a list": {"about.npy": about(alphas=[])},
    "alpha is text": {"about.npy": about(alphas={"int8-smooth": {"a": "x"}})},
    "exclude is text": {"about.npy": about(exclude="x")},
    "about is a pickle": {"about.npy": array(np.array([{"a": 1}], dtype=object))},
    "about is not JSON": {"about.npy": array(np.frombuffer(b"[" * 100_000, np.uint8))},
    "a shape of 10**40": {"amax/x.npy": b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (1"
                          + b"0" * 40 + b",), }" + b" " * 27 + b"\n"},
    "a header of brackets": {"amax/x.npy": b"\x93NUMPY\x01\0v\0" + b"(" * 117 + b"\n"},
    "a header of nothing": {"amax/x.npy": b"\x93NUMPY\x09\0v\0"},
    "a member that is no array": {"amax/x": b"text"},
    "NaN": {"amax/x.npy": array(np.array([np.nan], np.float32))},
    "a matrix": {"amax/x.npy": array(np.ones((2, 2), np.float32))},
    "strings": {"amax/x.npy": array(np.array(["x"]))},
}  # fmt: skip


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_that_lies(tmp_path: Path, name: str) -> None:
    path = archived(tmp_path / "c.npz", members(POCKET / "calibration.npz") | CALIBRATIONS[name])
    with pytest.raises(CalibrationError):
        read_calibration(path)


def test_a_calibration_that_is_large_once_unpacked(tmp_path: Path) -> None:
    files = {"about.npy": about(), "amax/x.npy": array(np.ones(1 << 22, np.float32))}
    path = archived(tmp_path / "c.npz", files, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(CalibrationError, match="compressed members"):
        read_calibration(path)


def test_flips_and_cuts_of_a_calibration(tmp_path: Path) -> None:
    content = (POCKET / "calibration.npz").read_bytes()
    path = tmp_path / "c.npz"
    for position in spread(range(0, len(content), max(1, len(content) // 4000)), 60):
        damaged = bytearray(content)
        damaged[position] ^= 0x40
        for text in (bytes(damaged), content[:position]):
            path.write_bytes(text)
            try:
                read_calibration(path)
            except CalibrationError:
                continue


def test_the_calibration_of_other_weights_stops_only_what_uses_it(bad_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(POCKET / "calibration.npz", bad_checkpoint / "calibration.npz")
    build(bad_checkpoint, tmp_path / "bundle")
    (bad_checkpoint / "calibration.npz").write_bytes(b"damaged")
    build(bad_checkpoint, tmp_path / "bundle")
    with pytest.raises(CalibrationError):
        plan_build(bad_checkpoint, gpu="l40s")
