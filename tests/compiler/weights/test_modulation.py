"""Modulation weights: a checkpoint and the file that is written from it give the same tables."""

from pathlib import Path

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
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
    record = write_modulation(config, readers, tmp_path, tables="float32")
    stored = compute_tables(BundleModulation(tmp_path, record), record, SIGMAS)
    direct = compute_tables(CheckpointModulation(config, readers["transformer"]), config, SIGMAS)
    assert direct.tobytes() == stored.tobytes()
    tables = split_tables(direct, config)
    assert tables.blocks.shape == (3, config.layers, config.modulation_rows * config.width)
    assert tables.out.shape == (3, 2 * config.width)


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"])))
    reader = checkpoint.reader("vae")
    with pytest.raises(CheckpointError, match=r"has no tensor 'norm_out\.linear\.weight'"):
        CheckpointModulation(checkpoint.model.transformer, reader)
