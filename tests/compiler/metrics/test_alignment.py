"""Known shifts and scales of photos are found, whatever the colors and the noise; what cannot be told is None."""

import numpy as np
import pytest

from qie.compiler.metrics.alignment import align
from tests.support.images import noise_image
from tests.support.photos import PHOTOS, recolored, view

SHIFTS = [(0.25, -0.5), (0.5, 0.0), (-1.0, 2.0), (5.0, -3.0)]
SCALES = [0.97, 0.995, 1.01, 1.03]


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_is_found(name: str, shift: tuple[float, float]) -> None:
    found = align(recolored(view(name, 128, shift=shift)), view(name, 128))
    assert found is not None
    assert found.shift == pytest.approx(shift, abs=0.05)
    assert found.scale == pytest.approx(1, abs=0.001)
    assert found.distance == pytest.approx(np.hypot(*shift), abs=0.1)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_is_found(name: str, scale: float) -> None:
    found = align(recolored(view(name, 128, scale=scale)), view(name, 128))
    assert found is not None
    assert found.scale == pytest.approx(scale, abs=0.001)
    assert found.shift == pytest.approx((0, 0), abs=0.05)


@pytest.mark.parametrize("side", [256, 512])
def test_larger_images_are_measured_as_well(side: int) -> None:
    found = align(recolored(view("coffee", side, shift=(2, -3), scale=0.98)), view("coffee", side))
    assert found is not None
    assert found.shift == pytest.approx((2, -3), abs=0.05)
    assert found.scale == pytest.approx(0.98, abs=0.001)


def test_both_at_once_in_an_image_that_is_no_square() -> None:
    found = align(view("astronaut", 192, shift=(1.5, 4), scale=1.02, height=112), view("astronaut", 192, height=112))
    assert found is not None
    assert found.shift == pytest.approx((1.5, 4), abs=0.05)
    assert found.scale == pytest.approx(1.02, abs=0.002)


@pytest.mark.parametrize("name", PHOTOS)
def test_other_noise_and_colors_are_no_shift(name: str) -> None:
    plain = view(name, 128)
    found = align(recolored(plain, seed=1), recolored(plain, seed=2)[..., ::-1])
    assert found is not None
    assert found.distance < 0.05
    assert found.scale == pytest.approx(1, abs=0.002)


def test_equal_images_lie_where_they_should() -> None:
    found = align(view("cat", 128), view("cat", 128))
    assert found is not None
    assert (found.distance, found.scale) == (0, 1)
    assert found.correlation == pytest.approx(1)


def test_it_cannot_tell_of_a_flat_image() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert align(flat, view("cat", 64)) is None
    assert align(view("cat", 64), flat) is None
    assert align(flat, flat) is None


@pytest.mark.parametrize("side", [64, 128])
def test_it_cannot_tell_of_images_of_other_things(side: int) -> None:
    assert align(view("coffee", side), view("motorcycle_left", side)) is None
    assert align(view("cat", side), view("astronaut", side)) is None
    assert align(np.asarray(noise_image(side, side)), view("cat", side)) is None


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        align(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8))
