"""Files that are whole or absent: what is there after success, failure and death, and where qie's home is."""

import errno
import fcntl
import hashlib
import os
import pwd
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qie.engines.errors import BundleError
from qie.engines.files import (
    is_writable,
    leftovers_of,
    qie_home,
    read_regular,
    replacing,
    sha256_of,
    temporary_name,
    try_lock,
)


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


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for variable in ("HOME", "QIE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BundleError, match="no home folder for bundles and caches; set QIE_HOME"):
        qie_home()


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


def test_a_file_beside_a_link_goes_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.png").symlink_to(tmp_path / "disk" / "real.png")
    with replacing(tmp_path / "out.png") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "out.png").is_symlink()
    assert (tmp_path / "disk" / "real.png").read_text() == "whole"


def test_only_one_writer_of_a_new_file_wins(tmp_path: Path) -> None:
    def write(number: int) -> bool:
        try:
            with replacing(tmp_path / "out", overwrite=False) as temporary:
                temporary.write_text(str(number) * 10_000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(64)))
    assert sum(won) == 1
    assert (tmp_path / "out").read_text() == str(won.index(True)) * 10_000
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("problem", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_new_file_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(os, "link", refuse)
    with replacing(tmp_path / "out", overwrite=False) as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    with pytest.raises(FileExistsError), replacing(tmp_path / "out", overwrite=False) as temporary:
        temporary.write_text("other")
    assert (tmp_path / "out").read_text() == "whole"
    assert names(tmp_path) == ["out"]


def test_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Readers see one whole file or another, whatever writes at the same time."""
    texts = [str(number) * 100_000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(10):
            with replacing(tmp_path / "out") as temporary:
                temporary.write_text(text)
            assert (tmp_path / "out").read_text() in texts

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts))
    assert names(tmp_path) == ["out"]


def test_a_temporary_name_that_was_guessed_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    temporary_name(tmp_path / "out").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), replacing(tmp_path / "out"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    killed = temporary_name(tmp_path / "out")
    killed.write_text("half")
    with replacing(tmp_path / "out") as live:
        live.write_text("slow")
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("fast")
        assert names(tmp_path) == sorted([live.name, "out"])
    assert (tmp_path / "out").read_text() == "slow"


def test_the_umask_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


# Leftovers and locks


def test_what_is_a_leftover(tmp_path: Path) -> None:
    for name in (f".a.b.{'0' * 16}.tmp", f".a.{'f' * 16}.removed", ".a.tmp", ".a.x.tmp", "a.12.tmp", ".a.9.tmp"):
        (tmp_path / name).touch()
    for name, file in ((".a.12.old", "vision.onnx"), (".a.13.old", "photo.png")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    found = [(name, kind) for _, name, kind in leftovers_of(tmp_path)]
    assert found == [("a", "old"), ("a.b", "tmp"), ("a", "removed")]
    assert [kind for _, _, kind in leftovers_of(tmp_path, "a")] == ["old", "removed"]
    assert leftovers_of(tmp_path / "missing") == []


def test_locks_are_seen_by_other_opens_and_other_processes(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.touch()
    first, second = os.open(file, os.O_RDWR), os.open(file, os.O_RDWR)
    assert try_lock(first, exclusive=False) is True
    assert try_lock(second, exclusive=False) is True
    assert try_lock(second, exclusive=True) is False
    asks = (
        "import os, sys; from qie.engines.files import try_lock;"
        "print(try_lock(os.open(sys.argv[1], os.O_RDWR), exclusive=True))"
    )
    told = subprocess.run([sys.executable, "-c", asks, str(file)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
    os.close(first)
    assert try_lock(second, exclusive=True) is True
    os.close(second)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    half = temporary_name(tmp_path / "out")
    half.write_text("of whom nobody knows whether he lives")
    with replacing(tmp_path / "out") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    assert half.exists()


# Before the work


def test_a_file_can_be_written_where_replacing_writes_it(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "ahead").symlink_to("absent")
    for name in ("there", "absent", "link", "ahead"):
        assert is_writable(tmp_path / name), name
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("new")


def test_what_is_no_place_for_a_file_cannot_be_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "away").symlink_to("none/x")
    for name in ("pipe", "loop", "away", "none/x", "n" * 300, "a\0", ".", "/dev/full"):
        assert not is_writable(tmp_path / name), name


def test_only_a_regular_file_of_some_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    assert read_regular(tmp_path / "file", most=4) == b"1234"
    with pytest.raises(ValueError, match="it has 4 bytes"):
        read_regular(tmp_path / "file", most=3)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("/dev/full")):
        with pytest.raises(ValueError, match="a folder, a pipe or a device"):
            read_regular(path, most=4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", most=4)
