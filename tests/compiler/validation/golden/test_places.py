"""Places are distinct, spread, and the same for ever."""

import numpy as np
import pytest

from qie.compiler.validation.golden.places import SAMPLES, sample_places

SHAPES = [(1, 1), (1, 300), (300, 1), (16, 16), (17, 16), (90, 128), (15360, 16), (8192, 3072), (1, 4096), (4096, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_places_are_distinct_ascending_and_inside(shape: tuple[int, int]) -> None:
    places = sample_places(shape)
    assert places.dtype == np.int64 and places.shape[1] == 2
    rows = [tuple(place) for place in places.tolist()]
    assert rows == sorted(set(rows))
    assert (places >= 0).all() and (places < shape).all()
    np.testing.assert_array_equal(places, sample_places(shape))
    if shape[0] * shape[1] <= SAMPLES:
        assert len(places) == shape[0] * shape[1]
    elif min(shape) > 1:
        assert len(places) > 0.75 * SAMPLES


@pytest.mark.parametrize("shape", [(120, 192), (8192, 3072), (15360, 16), (90, 128)])
def test_places_are_spread_over_rows_and_channels(shape: tuple[int, int]) -> None:
    """Every eighth of the rows and every eighth of the channels has its share, and so does every quarter of both."""
    places = sample_places(shape)
    for axis, parts in ((0, 8), (1, 8)):
        counts = np.bincount(places[:, axis] * parts // shape[axis], minlength=parts)
        assert counts.min() > 0.8 * len(places) / parts
    quarters = (places[:, 0] * 4 // shape[0]) * 4 + places[:, 1] * 4 // shape[1]
    assert np.bincount(quarters, minlength=16).min() > 0.5 * len(places) / 16


def test_the_first_rows_keep_their_share() -> None:
    """A graph that computes only the first half of the rows is compared at half of the places."""
    places = sample_places((120, 192))
    assert 0.45 < (places[:, 0] < 60).mean() < 0.55


def test_places_never_change() -> None:
    """Golden files hold values at these places."""
    assert sample_places((90, 128))[:4].tolist() == FIRST
    assert sample_places((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert len(sample_places((90, 128), 10)) == 10


FIRST = [[0, 25], [0, 41], [1, 35], [1, 51]]
