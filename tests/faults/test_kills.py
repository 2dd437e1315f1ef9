"""A process that is killed before any of its file operations loses nothing and leaves nothing for ever."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qie.engines.bundle.bundle import Bundle, bundles, open_bundle, remove_bundle, verify
from qie.engines.bundle.clean import remove, unneeded
from qie.engines.bundle.manifest import Manifest
from qie.engines.files import leftovers_of
from tests.support.killing import count_operations, kill_at
from tests.support.soak import spread

BUILD, EDIT, REMOVE = (f"tests.support.killed_actions:{name}" for name in ("build", "edit", "remove"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path, _, _ in leftovers_of(folder)]


def content(bundle: Bundle) -> Manifest:
    """What is in ``bundle``, whose files are as its manifest says, but for the time and memory of its build."""
    verify(bundle)
    engines = [replace(engine, build_seconds=0.0, build_peak_bytes=0) for engine in bundle.manifest.engines]
    return replace(bundle.manifest, engines=tuple(engines))


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [False, True], ids=["first build", "rebuild"])
def test_a_killed_build(checkpoint: Path, bundle: Path, qie_home: Path, earlier: bool) -> None:
    path = qie_home / "bundles" / "mine"
    if earlier:
        shutil.copytree(bundle, path)
    total = count_operations(BUILD, checkpoint, path)
    assert total > 40
    wanted = content(open_bundle("mine"))
    for number, operation in enumerate(spread(range(1, total + 1), 2)):
        if path.exists():
            remove_bundle(path)
        if earlier:
            shutil.copytree(bundle, path)
        code = kill_at(operation, SIGNALS[number % 3], BUILD, checkpoint, path)
        assert code != 0 or SIGNALS[number % 3] != signal.SIGKILL, operation  # a finalizer swallows other signals
        found = bundles()  # whole or absent
        assert found == (path,) or (not earlier and found == ()), operation
        if found:
            verify(open_bundle("mine"))
        assert kill_at(0, signal.SIGKILL, BUILD, checkpoint, path) == 0  # not killed
        assert content(open_bundle("mine")) == wanted, operation
        assert leftovers(path.parent) == [], operation


@pytest.mark.slow
def test_a_killed_deletion_frees_the_name(checkpoint: Path, bundle: Path, qie_home: Path) -> None:
    path = qie_home / "bundles" / "mine"
    shutil.copytree(bundle, path)
    total = count_operations(REMOVE, path)
    for number, operation in enumerate(spread(range(1, total + 1), 3)):
        shutil.copytree(bundle, path)
        kill_at(operation, SIGNALS[number % 3], REMOVE, path)
        if path.exists():
            verify(open_bundle("mine"))
            remove_bundle(path)
        assert bundles() == ()
        shutil.copytree(bundle, path)  # the name is free
        open_bundle("mine")
        assert all(remove(item) for item in unneeded())
        assert leftovers(path.parent) == [], operation
        remove_bundle(path)


@pytest.mark.slow
def test_a_killed_edit_leaves_a_whole_image_or_none(bundle: Path, workplace: Path, qie_home: Path) -> None:
    out = workplace / "out.png"
    total = count_operations(EDIT, bundle, "photo.png", out)
    wanted = out.read_bytes()
    for number, operation in enumerate(spread(range(1, total + 1), 3)):
        out.unlink(missing_ok=True)
        shutil.rmtree(qie_home / "modulation", ignore_errors=True)
        kill_at(operation, SIGNALS[number % 3], EDIT, bundle, "photo.png", out)
        assert not out.exists() or out.read_bytes() == wanted, operation
        assert kill_at(0, 9, EDIT, bundle, "photo.png", out) == 0
        assert out.read_bytes() == wanted
        assert leftovers(workplace) == [], operation
    with Image.open(out) as image:
        assert image.size == (64, 64)
