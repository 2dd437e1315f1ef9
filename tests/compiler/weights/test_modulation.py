"""Modulation weights: a checkpoint and the file that is written from it give the same tables."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.lora import Lora, open_lora
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.packing.build import build
from qie.compiler.planning.resolve import plan_build
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.weights.modulation import CheckpointModulation, write_modulation
from qie.engines.errors import CheckpointError
from qie.engines.inputs.modulation import BundleModulation, compute_tables, split_tables

SIGMAS = np.array([1.0, 0.63, 0.21, 0], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tables_of_a_checkpoint_are_those_of_its_bundle(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"], dtype=dtype)))
    config, readers = checkpoint.model.transformer, checkpoint.readers()
    made = write_modulation(config, readers, tmp_path, schedules=[SIGMAS], tables="float32", mode="weights")
    record = made.record
    stored = compute_tables(BundleModulation(tmp_path, record), record, SIGMAS)
    direct = compute_tables(CheckpointModulation(config, readers["transformer"]), config, SIGMAS)
    assert direct.tobytes() == stored.tobytes()
    tables = split_tables(direct, config)
    assert tables.blocks.shape == (3, config.layers, config.modulation_rows * config.width)
    assert tables.out.shape == (3, 2 * config.width)


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"])))
    reader = checkpoint.reader("vae")
    modulation = CheckpointModulation(checkpoint.model.transformer, reader)
    with pytest.raises(CheckpointError, match=r"has no tensor 'norm_out\.linear\.weight'"):
        modulation.read("norm_out.linear.weight")


def lora(layers: list[str], reader: TensorReader, path: Path, size: float) -> Lora:
    rng, tensors = np.random.default_rng(0), {}
    for layer in layers:
        out, inner = reader.shape(f"{layer}.weight")
        tensors[f"{layer}.lora_A.weight"] = (rng.standard_normal((4, inner)) / inner**0.5).astype(np.float32)
        tensors[f"{layer}.lora_B.weight"] = (size * rng.standard_normal((out, 4))).astype(np.float32)
    save_file(tensors, path)
    return open_lora(path, 1.0)


@pytest.mark.parametrize("layers", [["transformer_blocks.0.img_mod.1", "transformer_blocks.1.txt_mod.1"],
                                    ["norm_out.linear"], ["time_text_embed.timestep_embedder.linear_1"]])  # fmt: skip
def test_only_what_a_lora_touches_is_float32(tmp_path: Path, layers: list[str]) -> None:
    """A small difference is not lost in bfloat16, the rest is no larger than before, and the plan says so."""
    folder = write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"], dtype="bfloat16")
    reader = open_checkpoint(str(folder)).reader("transformer")
    file = lora(layers, reader, tmp_path / "l.safetensors", 0.001)
    plan = plan_build(folder, loras=[file.path], out=tmp_path / "bundle")
    record = build(plan).manifest.model.modulation
    assert record.file is not None
    assert record.file.bytes == plan.modulation_bytes
    assert plan.modulation_bytes < 1.5 * plan_build(folder).modulation_bytes
    weights = BundleModulation(tmp_path / "bundle", record)
    for tensor in record.tensors:
        layer = tensor.name.removesuffix(".weight")
        assert (tensor.dtype == "float32") == (layer in layers or tensor.name.endswith(".bias")), tensor.name
        delta = file.delta(tensor.name, tensor.shape)
        if delta is not None:
            lost = weights.read(tensor.name) - reader.read(tensor.name).astype(np.float32) - delta
            assert np.linalg.norm(lost) < 1e-3 * np.linalg.norm(delta)
