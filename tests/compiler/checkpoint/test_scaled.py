"""Float8 weights with scales: read as the numbers that they stand for, or refused; and what nothing reads is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing.build import build as build_bundle
from qie.compiler.planning.resolve import plan_build
from qie.engines.errors import CheckpointError

FP8 = ml_dtypes.float8_e4m3fn


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def weights(checkpoint: Path, subfolder: str) -> Path:
    return next((checkpoint / subfolder).glob("*.safetensors"))


def change(checkpoint: Path, subfolder: str, action: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(weights(checkpoint, subfolder))
    action(tensors)
    save_file(tensors, weights(checkpoint, subfolder))


def scale(tensors: dict[str, Any], key: str, shape: str = "tensor", mark: bool = False) -> None:
    """Store every matrix of a block as float8 with a scale."""
    for name, value in list(tensors.items()):
        if value.ndim != 2 or ("blocks" not in name and "layers" not in name):
            continue
        most = np.abs(value).max(axis=1, keepdims=True) if shape != "tensor" else np.abs(value).max()
        factor = np.asarray(np.where(most > 0, most / 448, 1), np.float32)
        tensors[name] = (value / factor).astype(FP8)
        stored = {"tensor": factor, "[1]": factor.reshape(1) if factor.size == 1 else factor,
                  "[out, 1]": factor, "[out]": factor.reshape(-1)}[shape]  # fmt: skip
        tensors[f"{name.removesuffix('.weight')}.{key}"] = stored
        tensors[f"{name.removesuffix('.weight')}.input_scale"] = np.ones((), np.float32)
    if mark:
        tensors["scaled_fp8"] = np.zeros(2, FP8)


@pytest.mark.parametrize("subfolder", ["transformer", "text_encoder"])
@pytest.mark.parametrize(
    ("key", "shape", "mark"),
    [("scale_weight", "tensor", True), ("weight_scale", "tensor", False), ("weight_scale", "[out, 1]", False),
     ("weight_scale", "[out]", False), ("weight_scale_inv", "tensor", False)],
)  # fmt: skip
def test_scales_are_applied(checkpoint: Path, copied: Path, subfolder: Any, key: str, shape: str, mark: bool) -> None:
    change(copied, subfolder, lambda tensors: scale(tensors, key, shape, mark))
    plain, scaled = (open_checkpoint(str(path)).readers()[subfolder] for path in (checkpoint, copied))
    assert set(scaled.names()) == set(plain.names())
    seen = 0
    for name in plain.names():
        wanted, found = plain.read(name).astype(np.float32), scaled.read(name)
        if found.ndim == 2 and scaled.dtype(name) == "float32" and not np.array_equal(wanted, found):
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            assert 0 < error < 0.05, name
            seen += 1
    assert seen > 5
    plan_build(copied)  # scales count as read


def test_float8_without_scales_is_read_as_it_is(copied: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    change(copied, "transformer", lambda tensors: tensors.update({name: tensors[name].astype(FP8)}))
    assert open_checkpoint(str(copied)).readers()["transformer"].dtype(name) == "float8_e4m3fn"
    plan_build(copied)


@pytest.mark.parametrize("shape", [(2,), (1, 3), (5, 5), (0,)])
def test_a_scale_of_another_shape_is_refused(copied: Path, shape: tuple[int, ...]) -> None:
    def action(tensors: dict[str, Any]) -> None:
        name = "transformer_blocks.0.attn.to_q.weight"
        tensors[name] = tensors[name].astype(FP8)
        tensors["transformer_blocks.0.attn.to_q.weight_scale"] = np.ones(shape, np.float32)

    change(copied, "transformer", action)
    with pytest.raises(CheckpointError, match="the scale of .* has shape .*, expected one per tensor or per output"):
        open_checkpoint(str(copied)).readers()


@pytest.mark.parametrize("name", ["weight_scale_2", "weight.absmax", "zero_point", "scales"])
def test_a_scale_that_qie_does_not_know_is_refused(copied: Path, name: str) -> None:
    change(
        copied, "transformer", lambda t: t.update({f"transformer_blocks.0.attn.to_q.{name}": np.ones(1, np.float32)})
    )
    with pytest.raises(CheckpointError, match=rf"nothing reads 'transformer_blocks.0.attn.to_q.{name}' of transformer"):
        plan_build(copied)


# What nothing reads


@pytest.mark.parametrize("subfolder", ["transformer", "text_encoder", "vae"])
def test_tensors_of_another_model_are_named(copied: Path, tmp_path: Path, subfolder: str) -> None:
    change(copied, subfolder, lambda tensors: tensors.update({"controlnet.0.weight": np.ones((4, 4), np.float32)}))
    sentence = (
        rf"nothing reads '(language_model\.)?controlnet.0.weight' of {subfolder}, so a part of the model would be lost"
    )
    with pytest.raises(CheckpointError, match=sentence):
        plan_build(copied)
    plan = plan_build(copied, allow_unread=True, out=tmp_path / "bundle")
    build_bundle(plan)


@pytest.mark.parametrize(
    ("subfolder", "key", "message"),
    [("transformer", "num_layers", "num_layers = 1"), ("text_encoder", "num_hidden_layers", "num_hidden_layers = 1"),
     ("vae", "num_res_blocks", "num_res_blocks = 0, expected")],
)  # fmt: skip
def test_half_of_a_model_is_not_built(copied: Path, subfolder: str, key: str, message: str) -> None:
    path = copied / subfolder / "config.json"
    config = json.loads(path.read_text())
    for inner in (config, config.get("text_config", {})):
        if key in inner:
            inner[key] = inner[key] // 2
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        plan_build(copied)


def test_what_is_left_out_on_purpose_is_not_named(checkpoint: Path) -> None:
    plan = plan_build(checkpoint)
    readers = plan.checkpoint.readers()
    unread = {
        name for subfolder, reader in readers.items() for name in reader.names() if name not in plan.read[subfolder]
    }
    assert "lm_head.weight" in unread
    assert any(name.endswith("time_conv.weight") for name in unread)
    assert "transformer_blocks.1.txt_mlp.net.2.weight" in unread
    assert len(unread) == 18
