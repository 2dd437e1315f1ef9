"""Places that a build does not write to, and disks that are full."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.command_line import Qie, Refusal, assert_says


def foreign(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    return folder


@pytest.mark.parametrize("command", ["build", "export"])
@pytest.mark.parametrize("out", ["thesis", ".", "photo.png", "bad", "link"])
def test_what_is_no_bundle_is_not_replaced(
    qie: Qie, refusal: Refusal, workplace: Path, bad_checkpoint: Path, command: str, out: str
) -> None:
    foreign(workplace / "thesis")
    (workplace / "link").symlink_to("thesis")
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    assert_says(refusal(qie(command, "bad", "--out", out)), r"choose another folder( or delete it)? \(--out\)$")
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before


def test_the_manifest_of_another_program_is_no_bundle(qie: Qie, refusal: Refusal, checkpoint: Path) -> None:
    page = foreign(Path("page"))
    (page / "manifest.json").write_text('{"name": "A web page"}')
    assert_says(refusal(qie("build", checkpoint, "--out", "page")), "is not a qie bundle; choose another folder")
    assert (page / "thesis.txt").is_file()


def test_an_empty_folder_and_a_bundle_are_replaced(qie: Qie, checkpoint: Path) -> None:
    Path("out").mkdir()
    for _ in range(2):
        assert qie("build", checkpoint, "--out", "out").returncode == 0
        assert qie("export", checkpoint, "--out", "graphs").returncode == 0


@pytest.mark.parametrize("name", ["../mine", "a/b", ".hidden", "", "a b"])
def test_name_of_a_bundle(qie: Qie, refusal: Refusal, checkpoint: Path, name: str) -> None:
    message = refusal(qie("build", checkpoint, "--name", name))
    assert_says(
        message,
        rf"the name of the bundle is {re.escape(repr(name))}, expected letters, .*; choose another name \(--name\)$",
    )


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_place_that_cannot_be_written(qie: Qie, refusal: Refusal, checkpoint: Path, command: str) -> None:
    message = refusal(qie(command, checkpoint, "--out", "photo.png/below"))
    assert_says(message, "photo.png/below cannot be written .*; choose another folder")


# A full disk


def test_a_disk_that_is_too_small(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    message = refusal(qie("build", checkpoint))
    assert_says(message, r"needs [\d,]+ bytes, .* has 1,000 free; free some space or choose")
    assert list(qie_home.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "export"])
@pytest.mark.parametrize("kilobytes", [20, 400])
def test_a_disk_that_fills_up(
    process: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, command: str, kilobytes: int
) -> None:
    """The kernel refuses to make a file larger than this: graphs or weights stop in the middle."""
    full = ("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash")
    done = process(command, checkpoint, "--out", "out", before=full)
    assert_says(refusal(done), r"needs [\d,]+ bytes, and .*make room, or build elsewhere|is full, .*; free some space")
    assert not Path("out").exists()


@pytest.mark.parametrize("function", ["write_manifest", "ModulationPiece"])
def test_a_disk_that_is_full_at_a_late_stage(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(f"qie.compiler.packing.pack.{function}", fail)
    assert_says(refusal(qie("build", checkpoint)), r"is full, [\d,]+ bytes are needed; free some space")
    assert list((qie_home / "bundles").iterdir()) == []
