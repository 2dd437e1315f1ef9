"""Casts and transpositions in blocks and threads, against those of numpy and ml_dtypes on whole arrays."""

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qie.compiler.weights.cast as module
import qie.compiler.weights.threads as threads
from qie.compiler.weights.cast import cast, transposed

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in each of three threads."""
    monkeypatch.setattr(threads, "LEAST", 1000)
    monkeypatch.setattr(module, "BLOCK", 300)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
@pytest.mark.parametrize("raw", [np.float64, np.float32, np.float16, BF16, ml_dtypes.float8_e5m2])
def test_casts(raw: Any, dtype: np.dtype[Any]) -> None:
    drawn = np.random.default_rng(0).integers(0, 2**16, 5000, np.uint16).view(np.float16)
    values = drawn[np.isfinite(drawn)].astype(raw)
    values = values[np.isfinite(values.astype(np.float32))]
    found = cast(values, dtype)
    assert found is not None and found.dtype == dtype
    assert found.tobytes() == values.astype(dtype).tobytes()


def test_float32_is_rounded_to_bfloat16_as_ml_dtypes_does() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 50_000, np.uint32)
    bits[:20_000] = bits[:20_000] & 0xFFFF_0000 | 0x8000  # ties
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values[np.isfinite(values.astype(BF16).astype(np.float32))]
    found = cast(values, BF16)
    assert found is not None and found.tobytes() == values.astype(BF16).tobytes()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38, -3.4e38])
@pytest.mark.parametrize("raw", [np.float32, np.float64, BF16])
@pytest.mark.parametrize("place", [0, 1999, 4999])
def test_what_is_not_finite_in_the_end_is_found(value: float, raw: Any, place: int) -> None:
    values = np.ones(5000, raw)
    with np.errstate(over="ignore", invalid="ignore"):
        values[place] = value
    assert cast(values, BF16) is None
    exists = np.isfinite(np.float32(values[place]))
    assert (cast(values, np.dtype(np.float32)) is not None) == exists


def test_nothing_is_copied_where_nothing_changes() -> None:
    values = np.ones(10, np.float32)
    assert cast(values, np.dtype(np.float32)) is values
    assert cast(np.empty(0, np.float32), BF16) is not None


@pytest.mark.parametrize("dtype", [np.uint8, BF16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.int4])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (37, 1100), (600, 31)])
def test_transpositions(shape: tuple[int, int], dtype: Any) -> None:
    itemsize = np.dtype(dtype).itemsize
    matrix = np.random.default_rng(0).integers(0, 256, (*shape, itemsize), np.uint8).view(dtype)[..., 0]
    whole = transposed(matrix)
    assert whole.flags.c_contiguous and whole.dtype == matrix.dtype
    assert whole.tobytes() == matrix.T.tobytes()
    assert transposed(matrix[:, shape[1] // 3 :]).tobytes() == matrix[:, shape[1] // 3 :].T.tobytes()
