"""Folders that are made: pieces that the next attempt takes up, and a place that is another folder's meanwhile."""

import gc
from pathlib import Path

import pytest

from qie.engines import folders as module
from qie.engines import new_folders
from qie.engines.folders import HeldFolder, clear_leftovers, leftovers, remove_folder
from qie.engines.new_folders import ReplacedError, replacing_folder, resumed_bytes, resumed_folder
from tests.support.folders import MANIFEST, make, names, replace_by

# Pieces that the next attempt takes up


def test_pieces_stay_after_a_failure_and_go_after_success(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    with pytest.raises(RuntimeError), resumed_folder(path, worth=1) as first:
        (first / "piece").write_text("12345")
        raise RuntimeError
    assert first.is_dir() and resumed_bytes(path) == 5
    with resumed_folder(path, worth=1) as second:
        assert second == first and (second / "piece").read_text() == "12345"
        assert resumed_bytes(path) == 0  # somebody has them
    assert names(tmp_path) == []


def test_a_folder_of_little_worth_goes_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumed_folder(tmp_path / "mine", worth=1):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_pieces_that_another_process_has_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    with resumed_folder(path, worth=1) as one:
        (one / "piece").touch()
        with resumed_folder(path, worth=1) as other:
            assert other != one and names(other) == [module.WORK_LOCK]
        clear_leftovers(path)
        assert (one / "piece").exists()


def test_of_several_folders_of_pieces_one_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    for token in ("0" * 16, "1" * 16):
        folder = tmp_path / f".mine.{token}.pieces"
        folder.mkdir()
        (folder / module.WORK_LOCK).touch()
        (folder / "piece").touch()
    with resumed_folder(path, worth=1) as folder:
        assert names(tmp_path) == [folder.name]


def test_pieces_outlive_a_replaced_folder_and_go_with_a_removed_one(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    with pytest.raises(RuntimeError), resumed_folder(path, worth=1) as folder:
        (folder / "piece").write_text("1")
        raise RuntimeError
    replace_by(path, "new")
    assert folder.exists() and folder in leftovers(tmp_path)
    assert remove_folder(path)
    assert names(tmp_path) == []


def test_own_pieces_go_after_success_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "try_lock", lambda descriptor, exclusive: None)
    monkeypatch.setattr(new_folders, "try_lock", lambda descriptor, exclusive: None)
    with resumed_folder(tmp_path / "mine", worth=1) as folder:
        (folder / "piece").touch()
    assert names(tmp_path) == []


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / module.WORK_LOCK).touch()
    (elsewhere / "precious").touch()
    links = [tmp_path / "work" / f".mine.{'0' * 16}.{kind}" for kind in ("pieces", "tmp", "removed")]
    links[0].parent.mkdir()
    for link in links:
        link.symlink_to(elsewhere)
    with resumed_folder(tmp_path / "work" / "mine", worth=1) as folder:
        assert folder not in links
    clear_leftovers(tmp_path / "work" / "mine")
    assert (elsewhere / "precious").exists() and names(tmp_path / "work") == sorted(link.name for link in links)


def test_links_that_lead_back_to_themselves(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (loop, loop / "inside"):
        with pytest.raises(OSError, match="symbolic links"), replacing_folder(path):
            pass
        with pytest.raises(OSError, match="symbolic links"), resumed_folder(path, worth=1):
            pass


# A folder that is another one than was read


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("later", ["before", "between look and exchange", "deleted", "deleted after the look"])
def test_another_folder_than_was_read_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str, exchanges: bool
) -> None:
    path = make(tmp_path / "mine", "old")
    name = "_exchange"
    held, inner = HeldFolder(path, MANIFEST), getattr(new_folders, name)

    def exchange(one: Path, other: Path) -> bool:
        monkeypatch.setattr(new_folders, name, inner)
        remove_folder(path) if later == "deleted after the look" else replace_by(path, "of another process")
        return bool(inner(one, other)) if exchanges else False

    if not exchanges:
        monkeypatch.setattr(new_folders, name, lambda one, other: False)
        inner = getattr(new_folders, name)
    with pytest.raises(ReplacedError), replacing_folder(path, lock=MANIFEST, replaces=held) as folder:
        (folder / MANIFEST).write_text("new")
        if later == "before":
            replace_by(path, "of another process")
        elif later == "deleted":
            remove_folder(path)
        else:
            monkeypatch.setattr(new_folders, name, exchange)
    del held
    gc.collect()
    deleted = later.startswith("deleted")
    assert names(tmp_path) == ([] if deleted else ["mine"])
    assert deleted or (path / MANIFEST).read_text() == "of another process"
