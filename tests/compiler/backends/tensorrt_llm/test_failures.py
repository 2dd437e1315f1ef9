"""What cannot be written is said before the first byte; what fails later leaves no file."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qie.compiler.backends.tensorrt_llm.checkpoint as module
from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.config import checkpoint_config
from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.backends.tensorrt_llm.tensors import checkpoint_bytes
from qie.engines.errors import BuildError, CheckpointError, ExportError, QieError, RecipeError
from tests.support.language_weights import LANGUAGE, language_settings, language_weights, linears
from tests.support.tensors import Tensors

LAYER = "language_model.layers.0."


def without(*parts: str) -> dict[str, float]:
    return {name: 1.0 for name in linears() if name not in [f"{LAYER}{part}" for part in parts]}


SMALL = replace(LANGUAGE, width=64, heads=1, kv_heads=1, mrope_section=(8, 12, 12))


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        (
            {"tensor_parallel": 3},
            ExportError,
            "3 GPUs were requested, expected one of 1, 2, 4; use one of these",
        ),
        (
            {"config": replace(LANGUAGE, heads=2, kv_heads=2, mrope_section=(64, 32, 32)), "tensor_parallel": 4},
            ExportError,
            "the attention heads of the language model, 2, cannot be split over 4 GPUs; use 1 or 2",
        ),
        (
            {"config": replace(LANGUAGE, kv_heads=1), "tensor_parallel": 2},
            ExportError,
            "the heads of keys and values of the language model, 1, cannot be split over 2 GPUs; use 1",
        ),
        (
            {"config": replace(LANGUAGE, intermediate=1002), "tensor_parallel": 4},
            ExportError,
            "the channels of the MLPs of the language model, 1002, cannot be split over 4 GPUs; use 1 or 2",
        ),
        (
            {"config": SMALL, "scheme": "w4a16"},
            ExportError,
            "transformer.layers.0.attention.qkv has 64 inputs and 192 outputs, and W4A16_AWQ of TensorRT-LLM needs "
            "multiples of 128; take another scheme for components.language, or exclude this linear",
        ),
        (
            {"config": SMALL, "scheme": "w4a16", "amax": {f"{LAYER}mlp.down_proj": 1.0}},
            ExportError,
            f"{LAYER}mlp.down_proj has 1024 inputs and 64 outputs, and W4A16_AWQ of TensorRT-LLM needs multiples of "
            "128; take another scheme for components.language, or exclude this linear",
        ),
        (
            {"config": replace(LANGUAGE, intermediate=1056), "scheme": "w8a16", "tensor_parallel": 2},
            ExportError,
            f"{LAYER}mlp.gate_proj has 512 inputs and 1056 outputs, and W8A16 of TensorRT-LLM needs multiples of 128; "
            "take another scheme for components.language, or exclude this linear",
        ),
        (
            {"scheme": "fp8", "amax": without("self_attn.k_proj")},
            RecipeError,
            f"components.language.exclude leaves out {LAYER}self_attn.k_proj and not {LAYER}self_attn.q_proj, "
            f"{LAYER}self_attn.v_proj, which TensorRT-LLM executes as one linear; exclude all of them or none",
        ),
        (
            {"scheme": "int8-smooth", "amax": without("mlp.gate_proj")},
            RecipeError,
            f"components.language.exclude leaves out {LAYER}mlp.gate_proj and not {LAYER}mlp.up_proj, which "
            "TensorRT-LLM executes as one linear; exclude all of them or none",
        ),
    ],
)
def test_what_the_format_cannot_express(
    tmp_path: Path, fields: dict[str, Any], error: type[QieError], text: str
) -> None:
    settings = language_settings(**fields)
    for act in (checkpoint_bytes, checkpoint_config, lambda given: write_checkpoint(given, Tensors({}), tmp_path)):
        with pytest.raises(error) as raised:
            act(settings)
        assert str(raised.value) == text
    assert not list(tmp_path.iterdir())


def test_amax_of_an_unknown_linear() -> None:
    with pytest.raises(AssertionError, match="language_model.norm"):
        checkpoint_bytes(language_settings(scheme="fp8", amax={"language_model.norm": 1.0}))


@pytest.fixture
def settings() -> Settings:
    return language_settings(scheme="fp8", tensor_parallel=2)


@pytest.fixture
def source(settings: Settings) -> Tensors:
    return language_weights(settings)


def test_missing_and_misshapen_tensors(tmp_path: Path, settings: Settings, source: Tensors) -> None:
    del source.tensors[f"{LAYER}self_attn.k_proj.bias"]
    source.tensors["language_model.norm.weight"] = np.zeros(511, np.float32)
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(settings, source, tmp_path)
    assert str(raised.value) == (
        f"weights do not match the configs: text_encoder tensor '{LAYER}self_attn.k_proj.bias' is missing, "
        "text_encoder tensor 'language_model.norm.weight' has shape [511], expected [512]; download the "
        "checkpoint again"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight", "layers.0.self_attn.v_proj.bias"]
)
def test_numbers_that_are_not_finite(tmp_path: Path, settings: Settings, source: Tensors, name: str) -> None:
    source.tensors[f"language_model.{name}"].reshape(-1)[-1] = np.nan
    with pytest.raises(CheckpointError, match=rf"'language_model\.{name}' has infinite or NaN elements"):
        write_checkpoint(settings, source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, source: Tensors) -> None:
    """Nothing is written, and what was there before stays."""
    (tmp_path / "config.json").write_text("before")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_234)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BuildError, match=r"rank0\.safetensors needs [\d,]{9,} bytes, and 1,234 are free .*make room"):
        write_checkpoint(settings, source, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", "before")]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, source: Tensors, call: int
) -> None:
    """Also when the file system notices only as a file is flushed, whichever file that is."""
    calls = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="No space left on device"):
        write_checkpoint(settings, source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, source: Tensors
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 100_000)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            assert all(path.name.startswith(".") for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(settings, source, tmp_path, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_config_appears_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, source: Tensors
) -> None:
    """Without it the folder is no checkpoint, so that a kill between two files leaves nothing that loads."""
    seen = []
    replace_file = Path.replace

    def spy(self: Path, target: Path) -> Path:
        seen.append(target.name)
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    write_checkpoint(settings, source, tmp_path)
    assert seen == ["rank1.safetensors", "rank0.safetensors", "config.json"]


def test_a_folder_that_does_not_exist(tmp_path: Path, settings: Settings, source: Tensors) -> None:
    with pytest.raises(BuildError, match="cannot be written"):
        write_checkpoint(settings, source, tmp_path / "nothing")
