"""Files that are whole or absent: what is there after success, failure and death, and where qie's home is."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qie.engines.files import qie_home, replacing, replacing_folder, sha256_of


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that no longer runs."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    return gone.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Where


def test_home_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("QIE_HOME", str(tmp_path / "mine"))
    assert qie_home() == tmp_path / "mine"
    monkeypatch.setenv("QIE_HOME", "")
    assert qie_home() == tmp_path / "cache" / "qie"
    monkeypatch.delenv("QIE_HOME")
    assert qie_home() == tmp_path / "cache" / "qie"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert qie_home() == tmp_path / "user" / ".cache" / "qie"


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# One file


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["out.png"]


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["out.png"]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.png"):
        pass
    assert names(tmp_path) == []


# One folder


@pytest.mark.parametrize("earlier", [True, False])
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
    path = tmp_path / "mine"
    path.mkdir()
    (path / "old").write_text("old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "the disk is gone")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"), replacing_folder(path) as folder:
        (folder / "new").write_text("new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["mine"]


@pytest.mark.parametrize("name", ["mine", "mine[1]", "m*"])
def test_leftovers_of_the_dead_are_cleared(tmp_path: Path, dead: int, name: str) -> None:
    for leftover in (f".{name}.{dead}.tmp", f".{name}.{dead}.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("half")
    (tmp_path / name).mkdir()
    with replacing_folder(tmp_path / name) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == [name]
    assert names(tmp_path / name) == ["new"]


def test_what_belongs_to_others_stays(tmp_path: Path, dead: int) -> None:
    """Leftovers of other folders, folders of processes that run, and files that only look alike."""
    others = [f".other.{dead}.tmp", f".mine.{os.getppid()}.tmp", ".mine.tmp", ".mine.notes.txt", f"mine.{dead}.tmp",
              f".mine.{dead}.tmp.txt", f".mine.more.{dead}.tmp"]  # fmt: skip
    for other in others:
        (tmp_path / other).mkdir()
    with replacing_folder(tmp_path / "mine"):
        pass
    assert names(tmp_path) == sorted([*others, "mine"])


@pytest.mark.parametrize("fails", [True, False])
def test_a_folder_that_was_moved_aside_is_put_back(tmp_path: Path, dead: int, fails: bool) -> None:
    """A process died after it had moved the earlier folder away and before it had put the new one there."""
    (tmp_path / f".mine.{dead}.old").mkdir()
    (tmp_path / f".mine.{dead}.old" / "old").write_text("old")
    (tmp_path / f".mine.{dead}.tmp").mkdir()
    try:
        with replacing_folder(tmp_path / "mine") as folder:
            assert names(tmp_path / "mine") == ["old"]
            (folder / "new").write_text("new")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == (["old"] if fails else ["new"])


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
