"""Bundles on disk: how one is found, what opens, what is refused with which words, and which engines are chosen."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.engines.bundle.bundle import (
    Bundle,
    bundles,
    bundles_folder,
    is_bundle,
    locate,
    open_bundle,
    remove_bundle,
    verify,
)
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.cache import encoder_cache_on_disk, tables_cache
from qie.engines.errors import BackendMissingError, BundleError, EngineMismatchError
from qie.engines.folders import leftovers, remove_leftover
from qie.engines.sessions.choose import choose_engines, refusal


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def name_one(bundle: Path, name: str, age: float = 0) -> Path:
    """Give a bundle a name; ``age`` in seconds since the epoch decides which is the newest."""
    folder = Path(shutil.copytree(bundle, bundles_folder() / name))
    os.utime(folder / "manifest.json", (age, age))
    return folder


def with_engines(bundle: Path, *changes: dict[str, Any]) -> Bundle:
    """The bundle with as many engines a component as there are changes."""
    opened = open_bundle(str(bundle))
    engines = tuple(replace(engine, **change) for engine in opened.manifest.engines for change in changes)
    return replace(opened, manifest=replace(opened.manifest, engines=engines))


# Found


def test_the_newest_comes_first(bundle: Path, qie_home: Path) -> None:
    assert bundles() == ()
    older, newer, equal = (name_one(bundle, name, age) for name, age in (("b", 10), ("c", 20), ("a", 10)))
    assert bundles() == (newer, equal, older)
    assert locate(None) == newer
    assert open_bundle().path == newer
    assert bundles_folder() == qie_home / "bundles"


def test_what_is_hidden_or_no_bundle_is_not_listed(bundle: Path) -> None:
    name_one(bundle, ".mine.123.tmp")
    (bundles_folder() / "empty").mkdir()
    (bundles_folder() / "file").write_text("x")
    assert bundles() == ()


def test_a_name_goes_before_a_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = name_one(bundle, "mine")
    shutil.copytree(bundle, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert locate("mine") == named
    assert locate(str(tmp_path / "mine")) == tmp_path / "mine"
    shutil.rmtree(named)
    assert locate("mine") == Path("mine")


def test_unknown(bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=r"no bundle 'x', neither by name \(available: none\) nor as a folder; choose"
    ):
        locate("x")
    name_one(bundle, "one", 1)
    name_one(bundle, "two", 2)
    with pytest.raises(BundleError, match=r"\(available: two, one\)"):
        locate("x")


def test_none_at_all(qie_home: Path) -> None:
    with pytest.raises(BundleError, match=f"no bundle in {qie_home}/bundles; build one with `qie build pocket"):
        locate(None)


# Opened


def test_open(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    assert (opened.path, opened.name) == (bundle, "tiny-cpu")
    files = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert opened.bytes == files - (bundle / "manifest.json").stat().st_size


def test_every_file_must_be_there_in_its_size(copied: Path) -> None:
    for record in open_bundle(str(copied)).manifest.files():
        file = copied / record.path
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(
            BundleError, match=f"{record.path} has {record.bytes - 1:,} bytes, .*{record.bytes:,}; build"
        ):
            open_bundle(str(copied))
        file.unlink()
        with pytest.raises(BundleError, match=f"lacks {record.path}; build the bundle again"):
            open_bundle(str(copied))
        file.mkdir()
        with pytest.raises(BundleError, match=f"lacks {record.path}"):
            open_bundle(str(copied))
        file.rmdir()
        file.write_bytes(content)
    open_bundle(str(copied))


def test_verify_reads_every_byte(copied: Path) -> None:
    opened = open_bundle(str(copied))
    seen: list[tuple[int, int]] = []
    verify(opened, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (opened.bytes, opened.bytes)
    assert len(seen) == len(opened.manifest.files())
    for record in opened.manifest.files():
        file = copied / record.path
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(BundleError, match=f"{record.path} is damaged; build the bundle again"):
            verify(open_bundle(str(copied)))
        content[-1] ^= 1
        file.write_bytes(content)
    verify(opened)


# Chosen


ABACUS: dict[str, Any] = {"backend": "abacus", "compute_capability": "8.9"}
OLD_GPU: dict[str, Any] = {"compute_capability": "1.0"}


def test_the_first_engine_that_fits_is_chosen(bundle: Path) -> None:
    chosen = choose_engines(with_engines(bundle, ABACUS, {"precision": "first"}, {"precision": "second"}))
    assert list(chosen) == list(COMPONENTS)
    assert all([engine.component for engine in chosen[component]] == [component] for component in COMPONENTS)
    assert all(engine.precision == "first" for (engine,) in chosen.values())


def test_no_engine_fits(bundle: Path) -> None:
    with pytest.raises(EngineMismatchError) as problem:
        choose_engines(with_engines(bundle, ABACUS, OLD_GPU))
    reasons, fixes = str(problem.value).split("; ")
    first, second = reasons.split(", and vision ")
    assert first == "vision is built for abacus/8.9, which this qie cannot execute"
    assert second.startswith("is built for onnxruntime/1.0, and ")
    assert "build for this machine with the recipe cpu" in fixes


def test_one_component_that_does_not_fit_is_enough(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    engines = tuple(replace(e, **ABACUS) if e.component == "transformer" else e for e in opened.manifest.engines)
    with pytest.raises(EngineMismatchError, match="^transformer is built for abacus/8.9"):
        choose_engines(replace(opened, manifest=replace(opened.manifest, engines=engines)))


def test_a_component_without_an_engine(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    engines = tuple(e for e in opened.manifest.engines if e.component != "vae_decoder")
    with pytest.raises(BundleError, match="has no engine for vae_decoder; build it again with `qie build`"):
        choose_engines(replace(opened, manifest=replace(opened.manifest, engines=engines)))


def test_a_backend_that_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qie.engines.sessions.choose.available", lambda backend: False)
    with pytest.raises(BackendMissingError, match="which is not installed here; run `pip install qie`"):
        choose_engines(open_bundle(str(bundle)))
    with pytest.raises(EngineMismatchError, match="not installed here.*cannot execute"):
        choose_engines(with_engines(bundle, {}, ABACUS))


def test_refusal_says_nothing_of_an_engine_that_runs(bundle: Path) -> None:
    assert [refusal(engine) for engine in open_bundle(str(bundle)).manifest.engines] == [None] * len(COMPONENTS)


# Deleted


def test_remove(copied: Path) -> None:
    remove_bundle(copied)
    assert not copied.exists()


def test_a_deletion_that_is_cut_short_frees_the_name(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(KeyboardInterrupt):
            remove_bundle(copied)
    assert not copied.exists()
    (left,) = leftovers(copied.parent)
    assert remove_leftover(left)
    assert list(copied.parent.glob(".*")) == []


def test_of_a_link_both_are_deleted(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    assert remove_bundle(tmp_path / "link")
    assert not copied.exists()
    assert not (tmp_path / "link").is_symlink()


def test_cached_tables_go_with_their_bundle(copied: Path) -> None:
    group = open_bundle(copied).manifest.model.modulation.identity
    cache = tables_cache()
    cache.store(group, "some steps", memoryview(b"table"))
    cache.store("0" * 64, "some steps", memoryview(b"table"))
    remove_bundle(copied)
    assert cache.load(group, "some steps") is None
    assert cache.load("0" * 64, "some steps") is not None


def test_cached_embeddings_go_with_their_bundle(copied: Path) -> None:
    groups = [engine.key for engine in open_bundle(copied).manifest.engines[:2]]
    cache = encoder_cache_on_disk()
    for group in (*groups, "0" * 64):
        cache.store(group, "an image", memoryview(b"embeddings"))
    remove_bundle(copied)
    assert [cache.load(group, "an image") for group in groups] == [None, None]
    assert cache.load("0" * 64, "an image") is not None


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"schema": 1, "name": "app"}', '{"manifest_version": 3}'])
def test_the_folder_of_another_program_is_not_deleted(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match="was not built by qie and is not deleted; choose a bundle of `qie list`"):
        remove_bundle(tmp_path)
    assert (tmp_path / "manifest.json").exists()


def test_what_is_a_bundle(bundle: Path, copied: Path, tmp_path: Path) -> None:
    assert is_bundle(bundle)
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "missing")
    assert not is_bundle(copied / "manifest.json")
    (copied / "manifest.json").write_text('{"schema": 99, "qie": "9.9", "engines": []}')
    assert is_bundle(copied)  # of a later qie
    damaged = name_one(bundle, "damaged")
    (damaged / "manifest.json").write_text("{")
    assert is_bundle(damaged)  # where it lies says whose it is
