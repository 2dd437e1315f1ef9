"""The metrics are what their formulas say, and refuse to compare arrays that do not belong together."""

import math

import numpy as np
import pytest

from qie.compiler.metrics.error import pooled_relative_l2, psnr_db, relative_l2


def test_psnr_of_a_constant_difference() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    assert psnr_db(image, image + 1) == pytest.approx(20 * math.log10(255))
    assert psnr_db(image + 51, image) == pytest.approx(20 * math.log10(5))
    assert psnr_db(np.float32([0.5]), np.float32([0.3]), peak=2.0) == pytest.approx(20.0)


def test_psnr_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (9, 7, 3), np.uint8) for _ in range(2))
    assert psnr_db(one, other) == pytest.approx(metrics.peak_signal_noise_ratio(one, other, data_range=255))


def test_equal_images_have_an_infinite_psnr() -> None:
    image = np.arange(12, dtype=np.uint8)
    assert psnr_db(image, image.copy()) == math.inf


def test_relative_l2() -> None:
    expected = np.float32([3.0, 4.0])
    assert relative_l2(expected, expected) == 0
    assert relative_l2(expected * 1.5, expected) == pytest.approx(0.5)
    assert relative_l2(np.float32([3.0, 4.5]), expected) == pytest.approx(0.1)


def test_samples_are_pooled_and_not_averaged() -> None:
    expected = [np.array([3.0, 4.0]), np.array([[0.0, 12.0]])]
    assert pooled_relative_l2([expected[0], expected[1] + 1.3 / np.sqrt(2)], expected) == pytest.approx(0.1)


def test_differences_are_taken_in_float64() -> None:
    expected = np.full(100_000, 1e4, np.float32)
    assert relative_l2(expected + np.float32(1 / 128), expected) == pytest.approx(1 / 128 / 1e4, rel=1e-9)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        psnr_db(np.zeros((2, 2)), np.zeros((2, 1)))
    with pytest.raises(AssertionError):
        relative_l2(np.ones((2, 2)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="zip"):
        pooled_relative_l2([np.ones(2)], [np.ones(2)] * 2)
