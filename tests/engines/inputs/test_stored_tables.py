"""Where modulation tables come from: the bundle, the cache, or the weights; and never from what was damaged."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.errors import BundleError
from qie.engines.inputs import modulation as module
from qie.engines.inputs.modulation import BundleModulation, Tables, compute_tables, modulation_tables, split_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.stored_schedules import SCHEDULES, table_name


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every time that tables were computed."""
    calls: list[int] = []

    def compute(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return compute_tables(*args, **kwargs)

    monkeypatch.setattr(module, "compute_tables", compute)
    return calls


def schedule(bundle: Bundle, steps: int) -> Any:
    return sigmas(bundle.manifest.model.scheduler, steps=steps, noise_tokens=64)


def equal(one: Tables, other: Tables) -> bool:
    return np.array_equal(one.blocks, other.blocks) and np.array_equal(one.out, other.out)


def close(one: Tables, other: Tables) -> bool:
    """Equal but for the order of sums: a build multiplies the timesteps of all schedules at once."""
    pairs = ((one.blocks, other.blocks), (one.out, other.out))
    return all(np.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)


def with_tables(bundle: Bundle, tables: Any) -> Bundle:
    model = bundle.manifest.model
    model = replace(model, modulation=replace(model.modulation, tables=tables))
    return replace(bundle, manifest=replace(bundle.manifest, model=model))


@pytest.mark.parametrize("tables", ["float32", "bfloat16"])
def test_cached_once_and_then_read(bundle: Path, tmp_path: Path, computed: list[int], tables: str) -> None:
    opened = with_tables(open_bundle(bundle), tables)
    values, cache = schedule(opened, 7), tmp_path / "cache"
    first = modulation_tables(opened, values, cache=cache)
    (file,) = cache.glob("*/*")
    inode = file.stat().st_ino
    assert file.stat().st_size == 32 + 7 * opened.manifest.model.modulation.values * (2 if tables == "bfloat16" else 4)
    second = modulation_tables(opened, values, cache=cache)
    assert computed == [1]
    assert file.stat().st_ino == inode
    assert equal(first, second)  # what was computed has the precision of what is stored
    if tables == "bfloat16":
        assert (first.blocks.view(np.uint32) & 0xFFFF == 0).all()
    modulation_tables(opened, schedule(opened, 9), cache=cache)
    assert computed == [1, 1]


def test_a_build_precomputes_what_the_runtime_would_compute(bundle: Path, tmp_path: Path, computed: list[int]) -> None:
    opened = open_bundle(bundle)
    record = opened.manifest.model.modulation
    for size in opened.manifest.limits.buckets:
        for steps in (20, 8, 4):
            values = sigmas(opened.manifest.model.scheduler, steps=steps, noise_tokens=size.area // 256)
            stored = modulation_tables(opened, values, cache=tmp_path / "cache")
            assert computed == []
            flat = compute_tables(BundleModulation(bundle, record), record, values)
            assert close(stored, split_tables(flat, record))
    assert not (tmp_path / "cache").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def flipped(path: Path, at: int = 5000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [cut, flipped, pickled, emptied, noise, a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tables_of_a_bundle_are_computed(copied: Path, damage: Callable[[Path], None]) -> None:
    opened = open_bundle(copied)
    values = sigmas(opened.manifest.model.scheduler, steps=20, noise_tokens=opened.manifest.limits.buckets[0].tokens)
    wanted = modulation_tables(opened, values)
    damage(copied / SCHEDULES / table_name(opened.manifest.model.modulation, values))
    assert close(modulation_tables(opened, values), wanted)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_of_the_cache_is_computed_again(
    bundle: Path, tmp_path: Path, computed: list[int], damage: Callable[[Path], None]
) -> None:
    opened, cache = open_bundle(bundle), tmp_path / "cache"
    values = schedule(opened, 7)
    wanted = modulation_tables(opened, values, cache=cache)
    (entry,) = cache.glob("*/*")
    whole = entry.read_bytes()
    damage(entry)
    assert equal(modulation_tables(opened, values, cache=cache), wanted)
    assert computed == [1, 1]
    if damage is not a_folder:
        assert entry.read_bytes() == whole


def test_an_entry_under_the_name_of_another_is_not_read(bundle: Path, tmp_path: Path, computed: list[int]) -> None:
    """Renamed, copied, or of a digest that another file had: the entry says what it was made from."""
    opened, cache = open_bundle(bundle), tmp_path / "cache"
    one, other = schedule(opened, 7), schedule(opened, 7) * np.float32(0.9)
    wanted = modulation_tables(opened, other, cache=cache)
    (entry,) = cache.glob("*/*")
    content = modulation_tables(opened, one, cache=cache)
    (second,) = set(cache.glob("*/*")) - {entry}
    second.replace(entry)
    assert not equal(content, wanted)
    assert equal(modulation_tables(opened, other, cache=cache), wanted)
    assert computed == [1, 1, 1]


@pytest.mark.parametrize("place", ["weights", "cache"])
def test_one_bad_read_poisons_nothing(copied: Path, tmp_path: Path, place: str) -> None:
    opened, cache = open_bundle(copied), tmp_path / "cache"
    values = schedule(opened, 7)
    wanted = modulation_tables(opened, values)
    file = copied / "modulation.weights"
    whole = file.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        flipped(file, at)
        with pytest.raises(BundleError, match="modulation.weights is damaged; build the bundle again"):
            modulation_tables(open_bundle(copied), values, cache=cache)
        file.write_bytes(whole)
        assert not cache.exists()
    verify(opened)
    assert equal(modulation_tables(open_bundle(copied), values, cache=cache), wanted)


def test_tables_that_are_not_finite_are_refused(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*args: Any, **kwargs: Any) -> Any:
        flat = compute_tables(*args, **kwargs)
        flat[3, 100] = np.nan
        return flat

    monkeypatch.setattr(module, "compute_tables", compute)
    opened = open_bundle(bundle)
    with pytest.raises(BundleError, match="values that are not finite; build the bundle again"):
        modulation_tables(opened, schedule(opened, 7), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_done_without(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    values = schedule(opened, 7)
    wanted = modulation_tables(opened, values, cache=tmp_path / "cache")
    (tmp_path / "file").write_text("in the way")
    assert equal(modulation_tables(opened, values, cache=tmp_path / "file" / "cache"), wanted)
