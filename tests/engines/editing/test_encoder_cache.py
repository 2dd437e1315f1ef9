"""The cache of embeddings: what it keeps, for how long, and that nobody can change it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from numpy.typing import NDArray

from qie.engines.cache import Cache
from qie.engines.editing.encoder_cache import EncoderCache, EncoderKey
from qie.engines.errors import RequestError

Array = NDArray[np.float32]


def key(name: str, engine: str = "engine") -> EncoderKey:
    return EncoderKey(engine=engine, digest=name)


def numbers(seed: int, shape: tuple[int, ...] = (1, 5, 4)) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def on_disk(folder: Path, bytes_max: int = 1 << 20) -> EncoderCache:
    """A cache without memory, so that what it finds comes from the disk."""
    return EncoderCache(bytes_max=0, disk=Cache(folder, bytes_max=bytes_max))


@pytest.mark.parametrize(
    "header", [(3, 0, 1 << 62, 1 << 62), (3, 1 << 62, 4, 0), (9, 1, 1, 1), (-1, 1, 1, 1), (1, -4, 0, 0)]
)
def test_a_header_that_no_array_has_is_none(tmp_path: Path, header: tuple[int, ...]) -> None:
    """With a digest that is right: whoever can write the folder can make one."""
    disk = Cache(tmp_path, bytes_max=1 << 20)
    cache = EncoderCache(bytes_max=0, disk=disk)
    cache.store(key("one"), numbers(1, (2, 2)))
    made: list[str] = []
    spied = EncoderCache(bytes_max=0, disk=Noted(disk, made))  # type: ignore[arg-type]
    spied.load(key("one"))
    disk.store(key("one").engine, made[0], memoryview(np.array(header, "<i8").tobytes()))
    assert cache.load(key("one")) is None


class Noted:
    """A cache that notes what it is asked for."""

    def __init__(self, disk: Cache, made: list[str]) -> None:
        self.disk, self.made = disk, made

    def load(self, group: str, made_from: str) -> memoryview | None:
        self.made.append(made_from)
        return self.disk.load(group, made_from)


@pytest.mark.parametrize("disk", [False, True])
def test_what_is_stored_is_found(tmp_path: Path, disk: bool) -> None:
    cache = on_disk(tmp_path) if disk else EncoderCache()
    assert cache.load(key("one")) is None
    for shape in ((1, 5, 4), (7, 3), (9,), (0, 4), ()):
        stored = numbers(1, shape)
        returned, found = cache.store(key("one"), stored), cache.load(key("one"))
        assert found is not None
        for array in (returned, found):
            assert (array.shape, array.dtype, array.tobytes()) == (shape, np.float32, stored.tobytes())
    assert cache.load(key("two")) is None
    assert cache.load(key("one", "another")) is None
    assert (cache.hits, cache.misses) == (5, 3)


@pytest.mark.parametrize("disk", [False, True])
def test_nobody_can_write_to_an_entry(tmp_path: Path, disk: bool) -> None:
    cache = on_disk(tmp_path) if disk else EncoderCache()
    source = numbers(1)
    before = source.tobytes()
    returned, found = cache.store(key("one"), source), cache.load(key("one"))
    assert found is not None
    source[:] = 0  # the entry is a copy
    for array in (returned, found, returned[0], found.reshape(-1)):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    again = cache.load(key("one"))
    assert again is not None
    assert returned.tobytes() == found.tobytes() == again.tobytes() == before


def test_the_least_recently_used_go() -> None:
    cache = EncoderCache(bytes_max=3 * 80)
    for name in "abc":
        cache.store(key(name), numbers(0))
    assert cache.load(key("a")) is not None
    cache.store(key("d"), numbers(0, (1, 3, 4)))
    assert cache.bytes == 3 * 80 - 32
    assert [cache.load(key(name)) is not None for name in "abcd"] == [True, False, True, True]
    cache.store(key("d"), numbers(0, (1, 2, 4)))  # replaces, and is not counted twice
    assert cache.bytes == 2 * 80 + 32
    cache.clear()
    assert (cache.bytes, cache.load(key("a"))) == (0, None)


def test_what_is_larger_than_the_cache_drops_nothing() -> None:
    cache = EncoderCache(bytes_max=100)
    cache.store(key("small"), numbers(0))
    large = cache.store(key("large"), numbers(1, (26,)))
    assert large.tobytes() == numbers(1, (26,)).tobytes()
    assert cache.load(key("large")) is None
    assert cache.load(key("small")) is not None
    cache.store(key("fits"), numbers(1, (25,)))
    assert cache.bytes == 100


def test_a_cache_of_no_bytes_keeps_nothing(tmp_path: Path) -> None:
    cache = EncoderCache(bytes_max=0)
    cache.store(key("one"), numbers(0))
    assert (cache.keeps, cache.bytes, cache.load(key("one"))) == (False, 0, None)
    assert EncoderCache().keeps
    assert on_disk(tmp_path).keeps
    with pytest.raises(RequestError, match="an encoder cache of -1 bytes was requested; give 0 for none, or a"):
        EncoderCache(bytes_max=-1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_kept(tmp_path: Path, value: float) -> None:
    cache = EncoderCache(disk=Cache(tmp_path, bytes_max=1 << 20))
    failed = numbers(0)
    failed[0, 2, 1] = value
    assert cache.store(key("one"), failed).tobytes() == failed.tobytes()
    assert cache.load(key("one")) is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_on_disk_is_kept_in_memory(tmp_path: Path) -> None:
    on_disk(tmp_path).store(key("one"), numbers(1))
    cache = EncoderCache(disk=Cache(tmp_path, bytes_max=1 << 20))
    assert cache.bytes == 0
    assert cache.load(key("one")) is not None
    for path in tmp_path.glob("*/*"):
        path.unlink()
    found = cache.load(key("one"))
    assert found is not None
    assert found.tobytes() == numbers(1).tobytes()


def test_a_damaged_entry_is_a_miss(tmp_path: Path) -> None:
    cache = on_disk(tmp_path)
    cache.store(key("one"), numbers(1))
    (path,) = tmp_path.glob("*/*")
    whole = path.read_bytes()
    for place in (0, 31, 32, 40, 63, 64, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.load(key("one")) is None
        path.write_bytes(whole[:place])
        assert cache.load(key("one")) is None
    path.write_bytes(whole)
    assert cache.load(key("one")) is not None


@pytest.mark.parametrize(
    "content",
    [b"", bytes(31), np.array([3, 1, 5, 5], "<i8").tobytes() + bytes(80), np.array([4, 1, 1, 1], "<i8").tobytes(),
     np.array([2, -1, -1, 0], "<i8").tobytes() + bytes(4), np.array([-1, 1, 1, 1], "<i8").tobytes() + bytes(4)],
)  # fmt: skip
def test_an_entry_of_another_layout_is_a_miss(tmp_path: Path, content: bytes) -> None:
    disk = Cache(tmp_path, bytes_max=1 << 20)
    cache = EncoderCache(disk=disk)
    cache.store(key("one"), numbers(1))
    cache.clear()
    disk.store("engine", "encoder entry 1 engine one", memoryview(content))
    assert cache.load(key("one")) is None


def test_the_disk_is_bounded(tmp_path: Path) -> None:
    cache = on_disk(tmp_path, bytes_max=4 * 144)
    for number in range(10):
        cache.store(key(str(number), f"engine {number % 3}"), numbers(number))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == 4 * 144
    assert cache.load(key("9", "engine 0")) is not None


def test_a_disk_that_takes_nothing_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = EncoderCache(disk=Cache(tmp_path / "file", bytes_max=1 << 20))
    cache.store(key("one"), numbers(1))
    assert cache.load(key("one")) is not None
    assert cache.load(key("two")) is None


@pytest.mark.parametrize("disk", [False, True])
def test_threads_share_a_cache(tmp_path: Path, disk: bool) -> None:
    """Eight of them, with keys that overlap and a bound that holds half: right numbers, and right counts."""
    threads, turns, keys, size = 8, 40 if disk else 1500, 6, 80
    cache = EncoderCache(
        bytes_max=3 * size, disk=Cache(tmp_path, bytes_max=(keys - 1) * 144) if disk else None
    )  # fmt: skip
    start = Barrier(threads)
    wanted = [numbers(number).tobytes() for number in range(keys)]

    def hammer(thread: int) -> int:
        start.wait()
        loads = 0
        for turn in range(turns):
            number = (turn * (thread + 1)) % keys
            found = cache.load(key(str(number)))
            loads += 1
            if found is None:
                found = cache.store(key(str(number)), numbers(number))
            assert found.tobytes() == wanted[number]
            assert cache.bytes <= 3 * size
            if turn % 97 == 96:
                cache.clear()
        return loads

    with ThreadPoolExecutor(threads) as pool:
        loads = sum(pool.map(hammer, range(threads)))
    assert loads == threads * turns == cache.hits + cache.misses
    assert cache.hits > 0
    assert cache.misses >= keys
    assert [path.name for path in tmp_path.glob("*/.*")] == []
