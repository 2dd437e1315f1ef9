"""Pieces: complete or absent, verified when they are taken up, and deleted with the build that used them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.packing import pieces as module
from qie.compiler.packing.pieces import RECORD, Piece, Pieces, open_pieces
from qie.engines.bundle.manifest import file_record

KEY, OTHER = "a" * 64, "b" * 64


def make(pieces: Pieces, key: str, content: str = "content") -> Piece:
    work = pieces.begin(key)
    (work / "schedules").mkdir()
    (work / "schedules/one").write_text(content)
    piece = Piece(files=(file_record(work, "schedules/one"),))
    pieces.keep(key, piece)
    return piece


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A destination for which a stopped build left one piece, and began another."""
    monkeypatch.setattr(module, "WORTH_KEEPING", 1)
    with pytest.raises(KeyboardInterrupt), open_pieces(tmp_path / "mine") as pieces:
        make(pieces, KEY)
        (pieces.begin(OTHER) / "half").touch()
        raise KeyboardInterrupt
    return tmp_path / "mine"


def change(place: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the record of a piece."""
    record = json.loads((place / RECORD).read_text())
    edit(record)
    (place / RECORD).write_text(json.dumps(record))


def behind_a_link(entry: Path) -> None:
    """Move a file or a folder elsewhere, and leave a link to it."""
    elsewhere = next(parent for parent in entry.parents if parent.suffix == ".pieces").with_name("elsewhere")
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


def test_what_is_complete_is_found_by_the_next_build(stopped: Path) -> None:
    with open_pieces(stopped) as pieces:
        piece = pieces.find(KEY)
        assert piece is not None and piece.files[0].path == "schedules/one"
        assert pieces.find(OTHER) is None
        assert {entry.name for entry in pieces.folder.iterdir()} == {".lock", KEY}
    assert not any(stopped.parent.iterdir())


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_piece(stopped: Path) -> None:
    place = next(stopped.parent.iterdir())
    (place / f"{OTHER}.work").mkdir()
    (place / f"{OTHER}.work" / RECORD).write_text(json.dumps({}))
    with open_pieces(stopped) as pieces:
        assert pieces.find(OTHER) is None
        pieces.retain([KEY, OTHER])
        assert pieces.begin(OTHER).is_dir() and not any(pieces.begin(OTHER).iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "schedules/one").write_text("CONTENT"),
        lambda place: (place / "schedules/one").write_text("longer content"),
        lambda place: (place / "schedules/one").unlink(),
        lambda place: (place / RECORD).write_text("{"),
        lambda place: (place / RECORD).write_text('{"engines": 1}'),
        lambda place: (place / RECORD).write_bytes(b"\xff"),
        lambda place: (place / RECORD).unlink(),
        lambda place: (place / RECORD).write_text("{}"),
        lambda place: (place / RECORD).write_text(json.dumps({"piece": {}, "sha256": "0" * 64})),
        lambda place: (place / RECORD).write_text("[" * 200_000),
        lambda place: change(place, lambda record: record["piece"]["files"].clear()),
        lambda place: change(place, lambda record: record.pop("sha256")),
        lambda place: behind_a_link(place / "schedules/one"),
        lambda place: behind_a_link(place / "schedules"),
        lambda place: behind_a_link(place),
    ],
)
def test_a_damaged_piece_is_made_again(stopped: Path, damage: object) -> None:
    damage(next(stopped.parent.iterdir()) / KEY)  # type: ignore[operator]
    with open_pieces(stopped) as pieces:
        assert pieces.find(KEY) is None
        make(pieces, KEY)
        assert pieces.find(KEY) is not None


def test_the_piece_of_another_key_is_none(stopped: Path) -> None:
    place = next(stopped.parent.iterdir())
    (place / KEY).rename(place / OTHER)
    with open_pieces(stopped) as pieces:
        assert pieces.find(OTHER) is None


def test_pieces_of_another_plan_are_deleted(stopped: Path) -> None:
    with open_pieces(stopped) as pieces:
        pieces.retain([OTHER])
        assert pieces.find(KEY) is None and not (pieces.folder / KEY).exists()


@pytest.mark.parametrize("links", [True, False])
def test_files_are_placed_without_a_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*paths: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "bundle"
    with open_pieces(tmp_path / "mine") as pieces:
        piece = make(pieces, KEY)
        inode = (pieces.folder / KEY / "schedules/one").stat().st_ino
        pieces.place(KEY, piece, target)
    assert (target / "schedules/one").read_text() == "content"
    assert (target / "schedules/one").stat().st_ino == inode
