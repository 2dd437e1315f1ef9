"""Folders that are whole or absent: after success, failure and death, and for who reads them meanwhile."""

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qie.engines import folders as module
from qie.engines import new_folders
from qie.engines.files import temporary_name
from qie.engines.folders import (
    HeldFolder,
    clear_leftovers,
    leftovers,
    remove_folder,
    remove_leftover,
    restore_moved,
)
from qie.engines.new_folders import replacing_folder
from tests.support.folders import MANIFEST, make, names, replace_by


@pytest.fixture(params=["exchange", "two renames"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system that lets two names change places at once."""
    if request.param == "two renames":
        monkeypatch.setattr(new_folders, "_exchange", lambda one, other: False)


# One folder


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.usefixtures("renames")
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, earlier: bool) -> None:
    path = tmp_path / "a" / "b" / "mine"
    if earlier:
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    with replacing_folder(path) as folder:
        (folder / "new").write_text("new")
        assert path.exists() == earlier
        assert not earlier or names(path) == ["old"]
    assert names(path) == ["new"]
    assert names(path.parent) == ["mine"]


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("problem", [ZeroDivisionError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_the_earlier_one(
    tmp_path: Path, earlier: bool, problem: type[BaseException]
) -> None:
    path = tmp_path / "mine"
    if earlier:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(problem), replacing_folder(path) as folder:
        (folder / "new").write_text("new")
        raise problem
    assert names(tmp_path) == (["mine"] if earlier else [])
    assert not earlier or names(path) == ["old"]


def test_a_failing_rename_puts_the_earlier_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "mine", "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "the disk is gone")
        return real(self, target)

    monkeypatch.setattr(new_folders, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        replace_by(path, "new")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize("name", ["mine", "mine[1]", "m*"])
def test_leftovers_of_the_dead_are_cleared(tmp_path: Path, name: str) -> None:
    for kind in ("tmp", "old", "removed"):
        make(temporary_name(tmp_path / name, kind), "half")
        temporary_name(tmp_path / name, kind).mkdir()  # killed before its lock was made
        (tmp_path / f".{name}.123.{kind}").mkdir()  # of an earlier qie, which named them by processes
        (tmp_path / f".{name}.123.{kind}" / "vision.weights").write_text("half")
    (tmp_path / name).mkdir()
    replace_by(tmp_path / name, "new")
    assert names(tmp_path) == [name]
    assert (tmp_path / name / "weights").read_text() == "new"


def test_what_belongs_to_others_stays(tmp_path: Path) -> None:
    """Leftovers of other folders, and names that only look alike."""
    token = "0" * 16
    others = [f".other.{token}.tmp", ".mine.tmp", ".mine.notes.txt", f"mine.{token}.tmp", f".mine.{token}.tmp.txt",
              f".mine.more.{token}.tmp"]  # fmt: skip
    for other in others:
        (tmp_path / other).mkdir()
    with replacing_folder(tmp_path / "mine"):
        pass
    assert names(tmp_path) == sorted([*others, "mine"])


def test_what_somebody_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    with replacing_folder(path, lock=MANIFEST) as slow:
        (slow / "weights").write_text("slow")
        replace_by(path, "fast")
        assert leftovers(tmp_path) == ()
        assert not remove_leftover(slow)
        assert (path / "weights").read_text() == "fast"
        assert (slow / "weights").read_text() == "slow"
    assert (path / "weights").read_text() == "slow"
    assert names(tmp_path) == ["mine"]


def test_a_folder_whose_lock_comes_between_two_looks_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread has made the folder and not yet its lock when this one looks for leftovers."""
    name, looks = "_open_lock", []
    inner = getattr(module, name)

    def look(folder: Path) -> Any:
        looks.append(folder)
        return ("", None) if len(looks) == 1 else inner(folder)

    with replacing_folder(tmp_path / "mine") as folder:
        (folder / "weights").write_text("of the other thread")
        monkeypatch.setattr(module, name, look)
        assert not module.remove_leftover(folder)
        monkeypatch.setattr(module, name, inner)
        assert (folder / "weights").read_text() == "of the other thread"
    assert looks == [folder, folder]
    empty = temporary_name(tmp_path / "mine")
    empty.mkdir()
    assert module.remove_leftover(empty)


def test_a_file_system_without_locks_keeps_what_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path, half = make(tmp_path / "mine", "old"), make(temporary_name(tmp_path / "mine"), "half")
    assert HeldFolder(path, MANIFEST).lock == b"old"
    replace_by(path, "new")
    assert (path / "weights").read_text() == "new"
    assert half.exists()


@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_that_was_moved_aside_is_put_back(tmp_path: Path, fails: bool) -> None:
    """A process died after it had moved the earlier folder away and before it had put the new one there."""
    make(temporary_name(tmp_path / "mine", "old"), "old")
    make(temporary_name(tmp_path / "mine"), "half")
    try:
        with replacing_folder(tmp_path / "mine") as folder:
            assert (tmp_path / "mine" / "weights").read_text() == "old"
            (folder / "new").write_text("new")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ([MANIFEST, "weights"] if fails else ["new"])


def test_only_what_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    make(temporary_name(tmp_path / "a", "old"), "a")
    make(temporary_name(tmp_path / "b", "removed"), "b")
    make(temporary_name(tmp_path / "c"), "c")
    restore_moved(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["a"]
    assert len(leftovers(tmp_path)) == 2


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk" / "mine")
    with replacing_folder(tmp_path / "mine") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "mine").is_symlink()
    assert names(tmp_path / "mine") == ["new"]
    assert names(tmp_path / "disk") == ["mine"]


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    with replacing_folder(Path()) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "mine") == ["new"]


# Held


@pytest.mark.usefixtures("renames")
def test_who_holds_a_folder_reads_what_it_opened(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    held = HeldFolder(path, MANIFEST)
    read = lambda folder: (folder / "weights").read_text()  # noqa: E731
    for content in ("new", "newer"):
        assert held.read(read) == "old"
        replace_by(path, content)
        assert held.replaced
        assert (path / "weights").read_text() == content
    assert held.lock == b"old"
    assert len(names(tmp_path)) == 2
    del held
    gc.collect()
    assert names(tmp_path) == ["mine"]


@pytest.mark.usefixtures("renames")
def test_a_replacement_while_the_last_reader_lets_go_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer finds the folder still held, and the reader may have looked before it was replaced."""
    path, close = make(tmp_path / "mine", "old"), os.close
    held = HeldFolder(path, MANIFEST)

    def replace_first(descriptor: int) -> None:
        monkeypatch.setattr(os, "close", close)
        replace_by(path, "new")
        assert len(names(tmp_path)) == 2
        close(descriptor)

    monkeypatch.setattr(os, "close", replace_first)
    del held
    gc.collect()
    assert (path / "weights").read_text() == "new"
    assert names(tmp_path) == ["mine"]


def test_a_folder_that_is_removed_lives_as_long_as_its_reader(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    one, other = HeldFolder(path, MANIFEST), HeldFolder(path, MANIFEST)
    assert not remove_folder(path)
    assert not path.exists()
    replace_by(path, "new")
    for held in (one, other):
        assert held.read(lambda folder: (folder / "weights").read_text()) == "old"
    del one, held
    gc.collect()
    assert other.read(lambda folder: (folder / "weights").read_text()) == "old"
    del other
    gc.collect()
    assert names(tmp_path) == ["mine"]
    assert remove_folder(path)
    assert names(tmp_path) == []


def test_a_reader_that_is_killed_keeps_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    holds = (
        "import sys, time; from pathlib import Path; from qie.engines.folders import HeldFolder;"
        "held = HeldFolder(Path(sys.argv[1]), 'manifest.json'); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holds, str(path)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == b"held\n"
        replace_by(path, "new")
        assert len(names(tmp_path)) == 2
        reader.kill()
    clear_leftovers(path)
    assert names(tmp_path) == ["mine"]


def test_a_replacement_in_the_middle_of_reading_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    held = HeldFolder(path, MANIFEST)
    seen: list[Path] = []
    discarded: list[str] = []

    def read(folder: Path) -> str:
        seen.append(folder)
        if len(seen) == 1:
            replace_by(path, "new")
        return (folder / "weights").read_text()

    assert held.read(read, discard=discarded.append) == "old"
    assert discarded == ["new"]
    assert seen[0] == path and seen[1] != path


def test_a_failure_that_comes_from_a_replacement_is_tried_again(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    held = HeldFolder(path, MANIFEST)
    calls: list[Path] = []

    def read(folder: Path) -> str:
        calls.append(folder)
        if len(calls) == 1:
            remove_folder(path)
        return (folder / "weights").read_text()

    assert held.read(read) == "old"
    with pytest.raises(FileNotFoundError):
        held.read(lambda folder: (folder / "missing").read_text())


def test_what_another_program_deleted_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "mine", "old")
    held = HeldFolder(path, MANIFEST)
    shutil.rmtree(path)
    assert held.replaced
    with pytest.raises(FileNotFoundError):
        held.read(lambda folder: folder)


def test_what_cannot_be_held(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "empty", "file"):
        with pytest.raises(OSError, match="No such file|Not a directory"):
            HeldFolder(tmp_path / name, MANIFEST)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError, match="No such file"):
            HeldFolder(tmp_path / "empty", MANIFEST)
        HeldFolder(make(tmp_path / "mine", "x"), MANIFEST)
        shutil.rmtree(tmp_path / "mine")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_that_was_read_is_replaced(tmp_path: Path, renames: None) -> None:
    path = make(tmp_path / "mine", "old")
    held = HeldFolder(path, MANIFEST)
    with replacing_folder(path, lock=MANIFEST, replaces=held) as folder:
        (folder / MANIFEST).write_text("new")
    assert (path / MANIFEST).read_text() == "new"
