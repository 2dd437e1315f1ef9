"""Flipped bits: each is refused by the opening or found by ``verify``, and never a traceback.

A flip that both let through would have to be one that changes nothing; there is none.
"""

import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.bundle.sealed import parse_manifest, read_manifest
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import BundleError, QieError
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.stored_schedules import SCHEDULES, table_name
from tests.support.images import smooth_image
from tests.support.soak import attempts, spread

REQUEST = Request(
    images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[1], steps=4, guidance=1.0, size=(64, 64)
)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def chosen(bundle: Path, count: int, seed: int) -> list[tuple[Path, int]]:
    """Half of the bits by the size of the files, half of them equal for every file."""
    generator = random.Random(seed)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    by_size = generator.choices(files, sizes, k=count // 2)
    equal = [files[number % len(files)] for number in range(count - count // 2)]
    return [(file, generator.randrange(8 * file.stat().st_size)) for file in (*by_size, *equal)]


def test_a_flipped_bit_is_found(copied: Path) -> None:
    wanted = Editor(open_bundle(copied)).edit(REQUEST).images[0].tobytes()
    refused = found = right = 0
    for file, bit in chosen(copied, attempts(60, 1000), seed=12):
        flip(file, bit)
        try:
            bundle: Bundle | None = open_bundle(copied)
        except BundleError:
            bundle = None
            refused += 1
        if bundle is not None:
            with pytest.raises(BundleError, match=f"{file.name} is damaged"):
                verify(bundle)
            found += 1
            with suppress(QieError):
                right += Editor(bundle).edit(REQUEST).images[0].tobytes() == wanted
        flip(file, bit)
    verify(open_bundle(copied))
    assert refused + found == attempts(60, 1000)
    assert refused and found and right


def test_every_bit_of_a_manifest_counts(bundle: Path) -> None:
    """What is read from a flipped manifest is refused, or every value is as it was (a flip in white space)."""
    content = (bundle / "manifest.json").read_bytes()
    wanted = read_manifest(bundle)
    refused = 0
    for bit in spread(range(8 * len(content)), 3000):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert parse_manifest(bytes(damaged), bundle / "manifest.json") == wanted
        except BundleError:
            refused += 1
    assert refused > 0.7 * min(8 * len(content), attempts(3000, 10**9))


def test_every_bit_of_the_header_of_a_table_counts(copied: Path) -> None:
    opened = open_bundle(copied)
    values = sigmas(opened.manifest.model.scheduler, steps=20, noise_tokens=opened.manifest.limits.buckets[0].tokens)
    wanted = modulation_tables(opened, values).blocks
    table = copied / SCHEDULES / table_name(opened.manifest.model.modulation, values)
    for bit in spread(range(1024), 100):
        flip(table, bit)
        assert np.allclose(modulation_tables(opened, values).blocks, wanted, rtol=0, atol=1e-5)
        flip(table, bit)


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "appended": lambda content: content + b"x",
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "ones": lambda content: b"\xff" * len(content),
    "shifted": lambda content: content[1:] + content[:1],
    "zero page": lambda content: content[: len(content) // 2] + bytes(min(4096, len(content) - len(content) // 2))
    + content[len(content) // 2 + 4096 :],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_structural_damage_is_found(copied: Path, damage: str) -> None:
    for file in sorted(path for path in copied.rglob("*") if path.is_file()):
        content = file.read_bytes()
        damaged = DAMAGES[damage](content)
        if damaged == content:
            continue
        file.write_bytes(damaged)
        with pytest.raises(BundleError):
            verify(open_bundle(copied))
        file.write_bytes(content)
    verify(open_bundle(copied))


@pytest.mark.parametrize("kind", ["folder", "FIFO", "dangling link", "loop of links", "link to outside", "missing"])
def test_what_is_no_file_is_refused(copied: Path, tmp_path: Path, kind: str) -> None:
    for file in sorted(path for path in copied.rglob("*") if path.is_file()):
        aside = tmp_path / "aside"
        file.rename(aside)
        match kind:
            case "folder":
                file.mkdir()
            case "FIFO":
                os.mkfifo(file)
            case "dangling link":
                file.symlink_to("nowhere")
            case "loop of links":
                file.symlink_to(file.name)
            case "link to outside":
                file.symlink_to(aside)
        if kind == "link to outside" and file.name == "manifest.json":
            open_bundle(copied)  # a link to the same content
        else:
            with pytest.raises(BundleError):
                open_bundle(copied)
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        aside.rename(file)
    verify(open_bundle(copied))


def test_files_of_equal_size_that_change_places_are_found(copied: Path) -> None:
    files = [path for path in copied.rglob("*") if path.is_file()]
    pairs = [(a, b) for a in files for b in files if a < b and a.stat().st_size == b.stat().st_size]
    assert pairs
    for one, other in pairs:
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        with pytest.raises(BundleError, match="is damaged"):
            verify(open_bundle(copied))
        other.write_bytes(one.read_bytes())
        one.write_bytes(content)
