"""Quantized values and scales, against numbers that are computed here in another way."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest

from qie.compiler.weights.quantizer import Quantizer

E4M3 = Quantizer(dtype="float8_e4m3fn")
INT8 = Quantizer(dtype="int8", per="channel")
INT4 = Quantizer(dtype="int4", per="group", group_size=4, bf16_scales=True)


def e4m3_values() -> list[float]:
    """Every finite E4M3 number from 0 up, from its definition: 4 bits of exponent with bias 7, 3 of mantissa."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    return small + [
        (1 + m / 8) * 2.0 ** (e - 7) for e, m in itertools.product(range(1, 16), range(8)) if (e, m) != (15, 7)
    ]


def test_e4m3_rounds_to_the_nearest_of_its_numbers() -> None:
    values = np.array(e4m3_values())
    assert values[-1] == 448
    x = np.random.default_rng(0).uniform(-460, 460, 4000) * np.random.default_rng(1).choice([1, 0.1, 1e-3], 4000)
    nearest = np.abs(np.abs(x)[:, None] - values).argmin(1)
    found = E4M3.fake_quantize(x.astype(np.float32), np.float32(1))
    distance = np.abs(np.abs(x) - values[nearest])
    assert np.abs(np.abs(found - x) - distance).max() < 1e-5 * 448


def test_the_largest_magnitude_becomes_qmax() -> None:
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) * [1, 10, 0.01]
    assert E4M3.scale(x) == pytest.approx(np.abs(x).max() / 448)
    assert INT8.scale(x) == pytest.approx(np.abs(x).max(0) / 127)
    assert np.abs(INT8.quantize(x, INT8.scale(x))).max(0).tolist() == [127, 127, 127]
    assert np.abs(E4M3.quantize(x, E4M3.scale(x)).astype(np.float32)).max() == 448


def test_integers_round_half_to_even_and_saturate() -> None:
    x = np.array([[0.5, 1.5, -2.5, 300.0, -300.0]], np.float32).T
    assert Quantizer(dtype="int8").quantize(x, np.float32(1)).ravel().tolist() == [0, 2, -2, 127, -128]
    assert E4M3.quantize(np.float32([1e9]), np.float32(1)).astype(np.float32) == 448


def test_groups_of_inputs_have_scales_of_their_own() -> None:
    """The last group may be short."""
    x = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    x[4:8] *= 100
    scale = INT4.scale(x)
    assert scale.shape == INT4.scale_shape(x.shape) == (3, 2)
    for group in range(3):
        exact = np.abs(x[4 * group : 4 * group + 4]).max(0) / 7
        assert scale[group] == pytest.approx(exact, rel=2**-8)
        assert (scale[group] == scale[group].astype(ml_dtypes.bfloat16)).all()
    error = np.abs(INT4.fake_quantize(x) - x)
    assert (error <= 0.51 * scale.repeat(4, 0)[:10] + 0.004 * np.abs(x)).all()


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros((4, 2), np.float32)
    for quantizer in (E4M3, INT8, INT4):
        assert (quantizer.scale(zeros) == 1).all()
        assert not quantizer.fake_quantize(zeros).any()


def test_error_is_that_of_the_format() -> None:
    """A uniform error of integers, a relative one of E4M3."""
    x = np.random.default_rng(0).standard_normal((4096, 1)).astype(np.float32)
    step = float(INT8.scale(x)[0])
    assert np.sqrt(np.mean((INT8.fake_quantize(x) - x) ** 2)) == pytest.approx(step / math.sqrt(12), rel=0.05)
    assert np.max(np.abs(E4M3.fake_quantize(x) - x) / np.maximum(np.abs(x), 0.02)) < 2**-4 * 1.001
