"""Smoothing scales and groups: the formula by hand, grouped-query heads, and which tensors carry the scales."""

import numpy as np
import pytest

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization.smoothing import Group, smoothed_reader, smoothing_groups, smoothing_scales
from tests.support.tensors import Tensors

INPUTS = np.array([1, 4, 16, 64], np.float32)
WEIGHTS = np.array([2, 2, 8, 8], np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_scales_follow_the_formula(alpha: float) -> None:
    """Of SmoothQuant's equation 4, but for a common factor."""
    scales = smoothing_scales(INPUTS, WEIGHTS, alpha)
    expected = INPUTS**alpha / WEIGHTS ** (1 - alpha)
    np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-6)
    assert np.prod(scales) == pytest.approx(1, rel=1e-5)
    assert scales.dtype == np.float32


def test_a_channel_of_zeros_gets_one_and_leaves_the_others() -> None:
    inputs, weights = np.append(INPUTS, [0, 5]).astype(np.float32), np.append(WEIGHTS, [5, 0]).astype(np.float32)
    scales = smoothing_scales(inputs, weights, 0.5)
    assert scales[4:].tolist() == [1, 1]
    assert np.array_equal(scales[:4], smoothing_scales(INPUTS, WEIGHTS, 0.5))
    assert smoothing_scales(np.zeros(3, np.float32), np.ones(3, np.float32), 0.5).tolist() == [1, 1, 1]


def test_heads_that_share_a_key_head_share_its_scales() -> None:
    """Two key heads of two channels, each read by three query heads."""
    group = Group(name="out", consumers=("o",), repeats=3, head_dim=2)
    values = np.array([1, 2, 3, 4], np.float32)
    assert group.expand(values).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert group.reduce_max(np.arange(12, dtype=np.float32)).tolist() == [4, 5, 10, 11]
    assert np.array_equal(group.reduce_max(group.expand(values)), values)


def test_a_group_without_repeats_changes_no_order() -> None:
    group = Group(name="up", consumers=("u",))
    assert np.array_equal(group.expand(INPUTS), INPUTS) and np.array_equal(group.reduce_max(INPUTS), INPUTS)


def test_two_linears_in_a_row_compute_the_same() -> None:
    """The rows of the first are divided, the columns of the second multiplied, and nothing else is touched."""
    rng = np.random.default_rng(0)
    shapes = {"v.weight": (4, 3), "v.bias": (4,), "o.weight": (2, 4), "other.weight": (2, 4)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    group = Group(name="out", consumers=("o",), producers=(("v.weight", "divide_rows"), ("v.bias", "divide_rows")))
    scales = np.array([0.5, 1, 2, 8], np.float32)
    reader: TensorReader = smoothed_reader(Tensors(tensors), [group], {"out": scales})
    after = {name: reader.read(name) for name in tensors}

    def product(values: dict[str, np.ndarray]) -> np.ndarray:
        return values["o.weight"] @ (values["v.weight"] @ np.ones(3, np.float32) + values["v.bias"])

    np.testing.assert_allclose(product(after), product(before), rtol=1e-5)
    np.testing.assert_allclose(after["v.bias"] * scales, before["v.bias"], rtol=1e-6)
    assert np.array_equal(after["o.weight"], before["o.weight"] * scales)
    assert np.array_equal(after["other.weight"], before["other.weight"])
    assert all(np.array_equal(tensors[name], before[name]) for name in tensors), "the checkpoint is not changed"


def test_a_last_block_without_the_texts_mlp() -> None:
    """Its groups hold the linears that exist; a GELU's output has no producer."""
    block = "transformer_blocks.1"
    linears = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0"]
    names = [f"{block}.{name}" for name in (*linears, "img_mlp.net.0.proj", "img_mlp.net.2")]
    groups = {group.name.removeprefix(f"{block}."): group for group in smoothing_groups("transformer", names)}
    assert set(groups) == {"img_attn", "txt_attn", "img_mlp.up", "img_mlp.down", "attn.out"}
    assert groups["txt_attn"].consumers == (f"{block}.attn.add_k_proj", f"{block}.attn.add_v_proj")
    assert groups["attn.out"].consumers == (f"{block}.attn.to_out.0",)
    assert groups["img_mlp.down"].producers == ()
    assert sorted(name for group in groups.values() for name in group.consumers) == sorted(names)
