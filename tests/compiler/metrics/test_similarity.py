"""SSIM has the constants of its paper, at every size."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qie.compiler.metrics.similarity import WINDOW, ssim
from tests.support.images import noise_image
from tests.support.photos import recolored, view


def by_the_paper(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, with a Gaussian window of 11 x 11 and a sigma of 1.5."""

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5, mode="reflect", axes=(0, 1))

    x, y = one.astype(float), other.astype(float)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    values = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return float(values[inside, inside].mean())


def test_ssim_is_that_of_the_paper() -> None:
    plain = view("cat", 96, height=64)
    changed = recolored(plain, noise=20)
    assert 0.2 < ssim(changed, plain) < 0.9
    assert ssim(changed, plain) == pytest.approx(by_the_paper(changed, plain), abs=1e-9)
    assert ssim(changed, plain) == pytest.approx(ssim(plain, changed), abs=1e-12)


def test_equal_images_have_one_and_inverted_ones_less_than_none() -> None:
    noise = np.asarray(noise_image(40, 40))
    assert ssim(noise, noise) == 1
    assert ssim(255 - noise, noise) < -0.5


def test_a_constant_is_compared_by_its_light_alone() -> None:
    dark, light = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 200, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, light) == pytest.approx((2 * 100 * 200 + c1) / (100**2 + 200**2 + c1))


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 30, 3), (10, 10, 3), (11, 5, 3)])
def test_an_image_may_be_smaller_than_the_window(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert ssim(image, image) == 1
    assert ssim(255 - image, image) < 1


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        ssim(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8))
