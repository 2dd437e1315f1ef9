"""Buckets and the mapping of wanted sizes into a bundle's limits."""

import pytest

from qie.engines.bundle.specs import ShapeLimits, Size
from qie.engines.errors import RequestError
from qie.engines.inputs.sizes import calculate_dimensions, fits, nearest_bucket, resolve_size

SQUARE = Size(width=1024, height=1024)
WIDE = Size(width=1376, height=768)
TALL = Size(width=768, height=1376)
LIMITS = ShapeLimits(
    buckets=(SQUARE, WIDE, TALL),
    min_side=128,
    max_side=1376,
    max_area=1376 * 768,
    batch_max=4,
    references_max=3,
    prompt_tokens_max=2560,
)


@pytest.mark.parametrize(
    ("area", "ratio", "expected"),
    [
        (1024 * 1024, 1.0, "1024x1024"),
        (1024 * 1024, 16 / 9, "1376x768"),
        (1024 * 1024, 4 / 3, "1184x896"),
        (1024 * 1024, 2 / 3, "832x1248"),
        (384 * 384, 4 / 3, "448x320"),
        (256 * 256, 16 / 9, "352x192"),
        (48 * 48, 1.0, "64x64"),  # 1.5 rounds to 2
        (80 * 80, 1.0, "64x64"),  # 2.5 rounds to 2: half to even, as in diffusers
    ],
)
def test_dimensions_are_those_of_diffusers(area: int, ratio: float, expected: str) -> None:
    assert str(calculate_dimensions(area, ratio)) == expected


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (4000, 4000, SQUARE),
        (1920, 1080, WIDE),
        (1080, 1920, TALL),
        (1330, 1000, SQUARE),  # log(1.33) is nearer to log(1) than to log(1.79)
        (1340, 1000, WIDE),  # and log(1.34) is not: the boundary is the geometric mean
        (1000, 1340, TALL),
        (10**400, 1, WIDE),
    ],
)
def test_nearest_bucket_is_by_aspect_ratio(width: int, height: int, expected: Size) -> None:
    assert nearest_bucket(LIMITS.buckets, width, height) == expected


def test_area_decides_between_buckets_of_one_aspect_ratio() -> None:
    buckets = (Size(width=512, height=512), SQUARE, Size(width=2048, height=2048))
    assert nearest_bucket(buckets, 1100, 1000) == SQUARE
    assert nearest_bucket(buckets, 600, 500) == buckets[0]
    assert nearest_bucket(buckets, 9000, 9000) == buckets[2]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1024, 1024, True),
        (1376, 768, True),
        (1008, 1040, True),
        (128, 128, True),
        (1024, 1000, False),
        (112, 512, False),
        (1392, 128, False),
        (1376, 784, False),
    ],
)
def test_fits(width: int, height: int, expected: bool) -> None:
    assert fits(LIMITS, width, height) is expected


def test_a_size_within_the_limits_is_used_in_silence() -> None:
    assert resolve_size(LIMITS, 1008, 640) == (Size(width=1008, height=640), None)


def test_sides_are_rounded_down_to_multiples_of_16() -> None:
    size, note = resolve_size(LIMITS, 1001, 703)
    assert size == Size(width=992, height=688)
    assert note == "requested 1001x703, using 992x688: sides are multiples of 16 pixels"


@pytest.mark.parametrize(
    ("width", "height", "expected", "reason"),
    [
        (1920, 1080, WIDE, "sides of at most 1376 pixels"),
        (1200, 1200, SQUARE, f"at most {1376 * 768} pixels in all"),
        (64, 64, SQUARE, "sides of at least 128 pixels"),
        (1, 1, SQUARE, "sides of at least 128 pixels"),
        (100, 1376, TALL, "sides of at least 128 pixels"),
        (127, 127, SQUARE, "sides of at least 128 pixels"),
        (10**400, 10**400, SQUARE, "sides of at most 1376 pixels"),
    ],
)
def test_a_size_outside_the_limits_becomes_a_bucket_and_says_so(
    width: int, height: int, expected: Size, reason: str
) -> None:
    size, note = resolve_size(LIMITS, width, height)
    assert size == expected
    assert note is not None
    assert note.startswith(f"requested {width}x{height}, using {expected}, the nearest bucket: ")
    assert reason in note


def test_a_rounded_size_on_the_limit_is_kept() -> None:
    assert resolve_size(LIMITS, 1391, 783)[0] == WIDE
    assert resolve_size(LIMITS, 143, 143)[0] == Size(width=128, height=128)


@pytest.mark.parametrize(("width", "height"), [(0, 512), (512, 0), (-16, 512), (512, -16)])
def test_sides_must_be_positive(width: int, height: int) -> None:
    with pytest.raises(RequestError, match=f"{width}x{height} has a side that is not positive; use") as problem:
        resolve_size(LIMITS, width, height)
    assert problem.value.option == "size"
