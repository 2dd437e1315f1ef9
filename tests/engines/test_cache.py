"""A cache that proves what it holds, within its size."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qie.engines.cache import Cache, encoder_cache_on_disk, tables_cache


def content(text: str) -> memoryview:
    return memoryview(text.encode())


def text(found: memoryview | None) -> str | None:
    return None if found is None else bytes(found).decode()


def test_what_is_stored_is_found_by_what_it_was_made_from(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "b", bytes_max=1000)
    assert cache.load("group", "one") is None
    cache.store("group", "one", content("1"))
    cache.store("group", "two", content("2"))
    assert [text(cache.load("group", made)) for made in ("one", "two", "three")] == ["1", "2", None]
    assert cache.load("other", "one") is None
    cache.store("group", "one", content("new"))
    assert text(cache.load("group", "one")) == "new"


def test_every_bit_of_an_entry_counts(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=1000)
    cache.store("group", "one", content("content"))
    (path,) = tmp_path.glob("*/*")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert cache.load("group", "one") is None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert cache.load("group", "one") is None
    path.write_bytes(whole + b"x")
    assert cache.load("group", "one") is None


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=3 * 132)
    for number in range(3):
        cache.store(f"group {number % 2}", str(number), content("x" * 100))
        (newest,) = [p for p in tmp_path.glob("*/*") if p.stat().st_mtime > 1000]
        os.utime(newest, (number, number))
    assert cache.load("group 0", "0") is not None  # used now
    cache.store("group 0", "3", content("x" * 100))
    kept = [cache.load(f"group {n % 2}", str(n)) is not None for n in range(3)]
    assert kept == [True, False, True]
    assert cache.load("group 0", "3") is not None
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 3 * 132


@pytest.mark.parametrize("what", ["pipe", "device", "sparse"])
def test_what_is_no_entry_is_none(tmp_path: Path, what: str) -> None:
    """It neither waits nor fills the memory."""
    cache = Cache(tmp_path, bytes_max=1 << 20)
    cache.store("group", "one", memoryview(b"content"))
    (path,) = tmp_path.glob("*/*")
    path.unlink()
    match what:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "sparse":
            path.touch()
            os.truncate(path, 1 << 40)
    assert cache.load("group", "one") is None


def test_a_private_cache_is_closed_to_others(tmp_path: Path) -> None:
    root = tmp_path / "private"
    root.mkdir(mode=0o777)
    Cache(root, bytes_max=1 << 20, private=True).store("group", "one", memoryview(b"content"))
    assert root.stat().st_mode & 0o777 == 0o700


def test_what_is_larger_than_the_cache_is_kept_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bytes_max=100)
    cache.store("group", "one", content("1"))
    cache.store("group", "two", content("x" * 1000))
    assert cache.load("group", "one") is None
    assert cache.load("group", "two") is not None


@pytest.mark.parametrize("group", ["group", "../..", "/etc", ".", "", "a/b", "x" * 5000])
def test_dropping_a_group_leaves_the_others(tmp_path: Path, group: str) -> None:
    (tmp_path / "mine").write_text("mine")
    cache = Cache(tmp_path / "home" / "cache", bytes_max=1000)
    cache.store("other", "one", content("1"))
    cache.store(group, "one", content("2"))
    cache.drop(group)
    cache.drop(group)
    assert cache.load(group, "one") is None
    assert text(cache.load("other", "one")) == "1"
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize(("cache", "name"), [(tables_cache, "modulation"), (encoder_cache_on_disk, "encoder")])
def test_a_cache_is_in_the_home(qie_home: Path, tmp_path: Path, cache: Callable[..., Cache], name: str) -> None:
    cache().store("group", "one", content("1"))
    assert len(list((qie_home / name).glob("*/*"))) == 1
    cache(tmp_path / "mine").store("group", "one", content("1"))
    assert len(list((tmp_path / "mine").glob("*/*"))) == 1
    assert [path.name for path in qie_home.iterdir()] == [name]


def test_an_entry_that_vanishes_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process deleted it between the listing and the look at its size; the bound holds."""
    cache = Cache(tmp_path, bytes_max=100)
    cache.store("group", "one", content("x" * 60))
    listed = list(tmp_path.glob("*/*"))
    gone = listed[0].with_name("gone")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [gone, *glob(path, pattern)])
    cache.store("group", "two", content("x" * 60))
    assert (cache.load("group", "one"), text(cache.load("group", "two"))) == (None, "x" * 60)
