"""Modulation tables that an earlier bundle has are taken over, as long as they are made from the same."""

from pathlib import Path

import pytest

from qie.compiler.packing import pack
from qie.compiler.packing.add_schedule import add_schedule
from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from tests.support import bundles

TABLES = 'extends = "cpu"\nmodulation = "tables"\n'


@pytest.fixture
def before(plain_bundle: Path, tmp_path: Path) -> Bundle:
    return open_bundle(str(bundles.linked(plain_bundle, tmp_path / "out")))


def inodes(bundle: Bundle) -> dict[str, int]:
    """The inodes of all files that hold modulation."""
    record = bundle.manifest.model.modulation.file
    files = [*bundle.manifest.schedules, *([] if record is None else [record])]
    return {file.path: (bundle.path / file.path).stat().st_ino for file in files}


def never(*_: object) -> None:
    raise AssertionError("modulation weights are read")


def test_a_build_that_needs_no_other_tables_reads_no_weights(
    checkpoint: Path, before: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, files = before.manifest.model.modulation, inodes(before)
    monkeypatch.setattr(pack, "ModulationPiece", never)
    after = bundles.build(checkpoint, before.path, 'extends = "cpu"\nresidency = "sequential"\n')
    verify(after)
    assert after.manifest.defaults.residency == "sequential"
    assert (after.manifest.model.modulation, inodes(after)) == (wanted, files)


def test_tables_that_were_added_are_left_out(checkpoint: Path, before: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    files = inodes(before)
    added = add_schedule(before, steps=7)
    assert len(inodes(added)) > len(files)
    monkeypatch.setattr(pack, "ModulationPiece", never)
    assert inodes(bundles.build(checkpoint, before.path)).keys() == files.keys()


@pytest.mark.parametrize("text", ['extends = "cpu"\n[[schedules]]\nsteps = 9\nguidance = 2.0\n', TABLES])
def test_other_tables_are_made(checkpoint: Path, before: Bundle, text: str) -> None:
    files = inodes(before)
    after = bundles.build(checkpoint, before.path, text)
    verify(after)
    assert inodes(after) != files
    assert after.manifest.model.modulation.key != before.manifest.model.modulation.key


def test_a_bundle_behind_links_gives_its_files(
    checkpoint: Path, plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new bundle has files, and no links that lead elsewhere."""
    monkeypatch.setattr(pack, "ModulationPiece", never)
    after = bundles.build(checkpoint, bundles.in_hub_cache(plain_bundle, tmp_path))
    verify(after)
    assert not any(path.is_symlink() for path in after.path.rglob("*"))


def test_a_damaged_table_is_made_again(checkpoint: Path, before: Bundle) -> None:
    record = before.manifest.schedules[0]
    file = before.path / record.path
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    after = bundles.build(checkpoint, before.path)
    verify(after)
    assert after.manifest.schedules == before.manifest.schedules
