"""Reading the next engine's file ahead."""

import os
from pathlib import Path

import pytest

from qie.engines.sessions import read_ahead as module
from qie.engines.sessions.read_ahead import PIECE, read_ahead


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *rest: calls.append(rest))
    return calls


def file_of(folder: Path, size: int) -> Path:
    path = folder / "engine"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_file_is_asked_for_piece_by_piece(tmp_path: Path, advised: list[tuple[int, int, int]]) -> None:
    thread = read_ahead(file_of(tmp_path, 2 * PIECE + 5))
    assert thread is not None
    thread.join()
    assert advised == [(offset, PIECE, os.POSIX_FADV_WILLNEED) for offset in (0, PIECE, 2 * PIECE)]


def test_a_file_that_would_push_itself_out_is_not_read(
    tmp_path: Path, advised: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_available_bytes", lambda: 1000)
    assert read_ahead(file_of(tmp_path, 501)) is None
    thread = read_ahead(file_of(tmp_path, 500))
    assert thread is not None
    thread.join()
    assert len(advised) == 1


@pytest.mark.parametrize("available", [None, 1 << 40])
def test_a_file_that_is_absent_or_a_system_that_tells_nothing(
    tmp_path: Path, available: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_available_bytes", lambda: available)
    assert read_ahead(tmp_path / "absent") is None
    if available is None:
        assert read_ahead(file_of(tmp_path, 10)) is None


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    path = file_of(tmp_path, 10)
    for _ in range(5):
        thread = read_ahead(path)
        assert thread is not None
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before
