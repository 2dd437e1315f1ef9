"""What may be deleted beside bundles, and what is never touched."""

import json
import shutil
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import bundles, bundles_folder, open_bundle, remove_bundle
from qie.engines.bundle.clean import remove, unneeded
from qie.engines.cache import encoder_cache_on_disk, tables_cache
from qie.engines.files import temporary_name
from tests.support.command_line import Qie


@pytest.fixture
def home(bundle: Path, qie_home: Path) -> Path:
    """A home with a bundle, what a stopped build left, and caches."""
    shutil.copytree(bundle, bundles_folder() / "mine")
    (temporary_name(bundles_folder() / "stopped") / "half").mkdir(parents=True)
    shutil.copytree(bundle, temporary_name(bundles_folder() / "deleted", "removed"))
    tables_cache().store("group", "made from", memoryview(bytes(968)))
    encoder_cache_on_disk().store("group", "made from", memoryview(bytes(1968)))
    (qie_home / "digests.json").write_text("{}")
    return qie_home


def test_what_is_unneeded(home: Path) -> None:
    items = unneeded()
    assert [item.what for item in items] == [
        "left by a stopped build or deletion of deleted",
        "left by a stopped build or deletion of stopped",
        "modulation tables of edits",
        "embeddings of images and instructions",
        "digests of checkpoints",
    ]
    sizes = {item.path.name: item.bytes for item in items}
    assert (sizes["modulation"], sizes["encoder"]) == (1000, 2000)
    assert all(remove(item) for item in items)
    assert unneeded() == ()
    assert sorted(path.name for path in home.iterdir()) == ["bundles"]
    assert [path.name for path in bundles_folder().iterdir()] == ["mine"]
    open_bundle("mine")


def test_what_is_in_use_stays(home: Path) -> None:
    held = open_bundle("mine")
    assert not remove_bundle(held.path)
    assert not any("mine" in item.what for item in unneeded())
    (left,) = bundles_folder().glob(".mine.*.removed")
    del held
    assert not left.exists()


def test_a_bundle_that_was_moved_aside_is_not_a_leftover(home: Path) -> None:
    (bundles_folder() / "mine").rename(temporary_name(bundles_folder() / "mine", "old"))
    assert [path.name for path in bundles()] == ["mine"]
    assert not any("mine" in item.what for item in unneeded())


def test_nothing_is_deleted_without_a_yes(qie: Qie, home: Path) -> None:
    before = sorted(home.rglob("*"))
    done = qie("clean")
    assert done.returncode == 0
    assert "modulation" in done.stdout
    assert "embeddings" in done.stdout
    assert "delete it with `qie clean --yes`" in done.stdout
    assert sorted(home.rglob("*")) == before
    items = json.loads(qie("clean", "--json").stdout)["items"]
    assert [item["deleted"] for item in items] == [False] * 5
    assert sorted(home.rglob("*")) == before
    items = json.loads(qie("clean", "--json", "--yes").stdout)["items"]
    assert [item["deleted"] for item in items] == [True] * 5
    assert qie("clean").stdout == "nothing to delete\n"
    assert qie("clean", "--yes").stdout == "nothing to delete\n"
    assert qie("inspect", "mine", "--verify").returncode == 0
