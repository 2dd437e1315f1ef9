"""Quantized values and scales, against numbers that are computed here in another way."""

import itertools
import math
import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qie.compiler.weights.magnitude as magnitude
import qie.compiler.weights.quantizer as quantizer_module
import qie.compiler.weights.threads as threads
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


def plain_scale(quantizer: Quantizer, tensor: np.ndarray) -> np.ndarray:
    magnitude = np.abs(tensor.astype(np.float32))
    match quantizer.per:
        case "tensor":
            amax = magnitude.max()
        case "channel":
            amax = magnitude.max(0)
        case "group":
            amax = np.maximum.reduceat(magnitude, np.arange(0, len(tensor), quantizer.group_size), axis=0)
    return quantizer.scale_from_amax(amax)


def plain_values(quantizer: Quantizer, tensor: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What the fast ways have to be equal to, one step after another on whole arrays; ml_dtypes rounds to E4M3."""
    expanded = scale.repeat(quantizer.group_size, 0)[: len(tensor)] if quantizer.per == "group" else scale
    steps = tensor.astype(np.float32) / expanded
    if quantizer.dtype == "float8_e4m3fn":
        return np.clip(steps, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return np.clip(np.rint(steps), -quantizer.qmax - 1, quantizer.qmax).astype(np.dtype(quantizer.dtype))


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize("shape", [(160, 70), (33, 5), (400, 300)])
def test_values_and_scales_are_those_of_the_plain_way(
    dtype: Any, per: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout and dtype, with numbers of all sizes, blocks that end anywhere, and three threads."""
    monkeypatch.setattr(threads, "LEAST", 4096)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(magnitude, "BLOCK", 1000)
    monkeypatch.setattr(quantizer_module, "BLOCK", 1000)
    rng = np.random.default_rng(len(per))
    quantizer = Quantizer(dtype=dtype, per=per, group_size=16 * (per == "group"), bf16_scales=dtype == "int4")
    for raw in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 2, shape)).astype(raw)
        for tensor in (x, np.ascontiguousarray(x.T).T, x[::2]):
            scale = quantizer.scale(tensor)
            assert np.array_equal(bits(scale), bits(plain_scale(quantizer, tensor)))
            expected, found = plain_values(quantizer, tensor, scale), quantizer.quantize(tensor, scale)
            assert found.dtype == expected.dtype
            assert np.array_equal(bits(found), bits(expected))
            dequantized = quantizer.dequantize(expected, scale)
            assert np.array_equal(bits(quantizer.fake_quantize(tensor, scale)), bits(dequantized))


@pytest.mark.parametrize("raw", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_e4m3_of_every_number_of_16_bits_and_of_many_of_32(raw: Any) -> None:
    """Ties, subnormal numbers, zeros of either sign, and what saturates."""
    every = np.arange(2**16, dtype=np.uint16)
    if raw == np.float32:
        ties = (every.astype(np.uint32) << 16) | np.array([[0], [1], [0x7FFF], [0x8000], [0xFFFF]], np.uint32)
        drawn = np.random.default_rng(0).integers(0, 2**32, 500_000, np.uint32)
        numbers = np.concatenate([ties.ravel(), drawn]).view(np.float32)
    else:
        numbers = every.view(raw)
    numbers = numbers[~np.isnan(numbers.astype(np.float32))]
    expected = np.clip(numbers.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    one = np.float32(1)
    assert np.array_equal(bits(E4M3.quantize(numbers, one)), bits(expected))
    assert np.array_equal(bits(E4M3.fake_quantize(numbers, one)), bits(expected.astype(np.float32)))


def test_nan_stays_nan() -> None:
    """Whatever its bits are."""
    codes = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00001], np.uint32)
    x = np.concatenate([codes.view(np.float32), np.float32([1e-9, 3.0])])
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(bits(E4M3.quantize(x, np.float32(1))), bits(expected))
    assert np.isnan(E4M3.fake_quantize(x, np.float32(1))).tolist() == [True] * 5 + [False] * 2


def test_what_is_not_finite_is_seen_in_the_largest_magnitude() -> None:
    x = np.ones((4, 3), np.float32)
    x[2, 1], x[3, 2] = np.nan, -np.inf
    for tensor in (x, np.ascontiguousarray(x.T).T, x.astype(ml_dtypes.bfloat16)):
        assert np.array_equal(INT8.amax(tensor), [1, np.nan, np.inf], equal_nan=True)
        assert np.isnan(E4M3.amax(tensor))
