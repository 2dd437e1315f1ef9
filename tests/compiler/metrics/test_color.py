"""Colors differ by CIEDE2000, and what an edit leaves alone is found."""

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, lab2rgb

from qie.compiler.metrics.color import mean_delta_e, untouched
from tests.support.photos import recolored, view

PAIRS = [
    # Sharma, Wu and Dalal 2005, table 1: those whose colors are within sRGB
    ((50.0, 2.5, 0.0), (50.0, 0.0, -2.5), 4.3065),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
    ((50.0, 2.5, 0.0), (58.0, 24.0, 15.0), 19.4535),
    ((50.0, 2.5, 0.0), (50.0, 3.1736, 0.5854), 1.0),
]


@pytest.mark.parametrize(("one", "other", "expected"), PAIRS)
def test_colors_differ_as_published(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert deltaE_ciede2000(one, other) == pytest.approx(expected, abs=1e-4)
    pixels = [np.round(lab2rgb(np.array(lab)[None, None]) * 255).astype(np.uint8) for lab in (one, other)]
    assert mean_delta_e(*pixels) == pytest.approx(expected, abs=0.8)  # 8 bits round a color by up to 0.4


def test_equal_images_do_not_differ() -> None:
    image = view("coffee", 48)
    assert mean_delta_e(image, image) == 0
    assert mean_delta_e(recolored(image, noise=0), image) > 2


def test_only_masked_pixels_count() -> None:
    image = np.full((8, 8, 3), 120, np.uint8)
    changed = image.copy()
    changed[:4] = 200
    upper = np.zeros((8, 8), bool)
    upper[:4] = True
    whole = mean_delta_e(changed, image)
    assert mean_delta_e(changed, image, ~upper) == 0
    assert mean_delta_e(changed, image, upper) == pytest.approx(2 * whole)
    with pytest.raises(AssertionError, match="mask is empty"):
        mean_delta_e(changed, image, np.zeros((8, 8), bool))


def test_what_an_edit_leaves_alone_is_found() -> None:
    source = view("cat", 128)
    edit = np.clip(source + np.random.default_rng(0).normal(0, 6, source.shape), 0, 255).astype(np.uint8)
    edit[:, 64:] = 255 - edit[:, 64:]
    mask = untouched(source, edit)
    assert mask is not None
    assert mask[:, :56].mean() > 0.98
    assert mask[:, 72:].mean() < 0.15


def test_an_edit_that_changes_everything_leaves_nothing_alone() -> None:
    source = view("cat", 64)
    assert untouched(source, 255 - source) is None
    edit = (255 - source).astype(np.uint8)
    edit[:8] = source[:8]  # an eighth
    assert untouched(source, edit) is not None


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError):
        mean_delta_e(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(AssertionError):
        untouched(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8))
