"""Ranges that cover everything once, in as many threads as there are cores, and errors that come out of them."""

import os
import threading

import pytest

import qie.compiler.weights.threads as module
from qie.compiler.weights.threads import in_threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("setting", "number"), [("", 4), ("2", 2), ("1", 1), ("9", 4), ("0", 4), ("all", 4), ("4,2", 4)]
)
def test_a_thread_per_core_unless_fewer_are_asked_for(
    setting: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert module.threads() == number


@pytest.mark.parametrize(("count", "elements", "number"), [(100, 1 << 22, 4), (3, 1 << 22, 3), (100, 1000, 1)])
def test_ranges_cover_everything_once(count: int, elements: int, number: int) -> None:
    ranges: list[tuple[int, int]] = []
    in_threads(lambda start, stop: ranges.append((start, stop)), count, elements=elements)
    assert len(ranges) == number
    assert [index for start, stop in sorted(ranges) for index in range(start, stop)] == list(range(count))


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_an_error_comes_out_and_no_thread_stays(failing: int) -> None:
    def work(start: int, stop: int) -> None:
        if start <= failing * 25 < stop:
            raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        in_threads(work, 100, elements=1 << 22)
    assert threading.active_count() == before
