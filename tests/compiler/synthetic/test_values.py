"""Values of synthetic tensors: a seed decides them, a few channels are large, and outputs keep their size."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qie.compiler.synthetic.values import LARGEST, SMALLEST, TensorValues

DOWN = "transformer_blocks.3.img_mlp.net.2.weight"
MODULATION = "transformer_blocks.3.txt_mod.1.weight"


def tensor(name: str, *shape: int, seed: int = 0, subfolder: Any = "transformer") -> TensorValues:
    return TensorValues(subfolder=subfolder, name=name, shape=shape, seed=seed)


def values(of: TensorValues) -> NDArray[np.float32]:
    """All of them, made from the last piece to the first."""
    pieces = [bytes(of.piece(number)) for number in reversed(range(of.pieces))]
    return np.frombuffer(b"".join(reversed(pieces)), ml_dtypes.bfloat16).astype(np.float32).reshape(of.shape)


def test_a_seed_and_a_name_decide_them() -> None:
    same, other_seed = values(tensor("a.weight", 600, 1030)), values(tensor("a.weight", 600, 1030, seed=1))
    np.testing.assert_array_equal(values(tensor("a.weight", 600, 1030)), same)
    assert (values(tensor("b.weight", 600, 1030)) != same).mean() > 0.9
    assert (other_seed != same).mean() > 0.9


def test_pieces_are_whole_rows_and_differ() -> None:
    large = tensor("a.weight", 1024, 2050)
    assert large.pieces == 3
    rows = values(large)
    assert len(np.unique(rows[:, :8].copy().view("V32"))) == len(rows)


@pytest.mark.parametrize("shape", [(64, 8192), (4096,), (5, 3, 3, 3, 3)])
def test_they_are_spread_by_kind_of_parameter(shape: tuple[int, ...]) -> None:
    made = values(tensor("plain.weight", *shape))
    center, std = (1.0, 0.2) if len(shape) == 1 else (0.0, 1 / np.sqrt(np.prod(shape[1:])))
    bound = 0.2 if made.size < 1000 else 0.02
    assert made.mean() == pytest.approx(center, abs=bound)
    assert made.std() == pytest.approx(std, rel=bound)
    assert np.abs(made - center).max() <= 2.31 * std * (1 if center == 0 else 1.01)


def test_a_down_projection_has_large_inputs_and_outputs_of_unchanged_size() -> None:
    down = tensor(DOWN, 1024, 4096)
    columns, rows = down.outliers
    assert len(columns) == 4 and rows == ()
    made = values(down)
    spread = made.std(axis=0)
    ordinary = np.median(spread)
    np.testing.assert_array_equal(np.sort(columns), np.flatnonzero(spread > 5 * ordinary))
    assert (spread[list(columns)] / ordinary).min() > SMALLEST * 0.8
    assert (spread[list(columns)] / ordinary).max() < LARGEST * 1.2
    inputs = np.random.default_rng(0).standard_normal((256, 4096), np.float32)
    assert (inputs @ made.T).std() == pytest.approx(1, rel=0.1)


def test_a_modulation_has_large_scales() -> None:
    modulation = tensor(MODULATION, 6 * 256, 256)
    columns, rows = modulation.outliers
    assert len(columns) == 1 and sorted(row // 256 for row in rows) == [1, 4]
    spread = values(modulation).std(axis=1)
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(spread > 5 * np.median(spread)))


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_of_the_language_model_has_large_gains(norm: str) -> None:
    gains = tensor(f"language_model.layers.0.{norm}.weight", 3584, subfolder="text_encoder")
    made = values(gains)
    np.testing.assert_array_equal(np.sort(gains.outliers[0]), np.flatnonzero(np.abs(made) > 3))
    assert len(gains.outliers[0]) == 3


def test_channels_are_those_of_one_tensor() -> None:
    deeper = tensor(DOWN.replace("3", "4"), 1024, 4096)
    assert deeper.outliers != tensor(DOWN, 1024, 4096).outliers
    assert tensor("transformer_blocks.3.attn.to_q.weight", 1024, 4096).outliers == ((), ())
