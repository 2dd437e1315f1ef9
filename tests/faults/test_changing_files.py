"""Files that change while they are read, and files of others in the way: refused, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qie.compiler.checkpoint.lora import open_lora
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.packing.export import export_graphs
from qie.engines.bundle.bundle import open_bundle, remove_bundle, verify
from qie.engines.bundle.clean import remove, unneeded
from qie.engines.errors import BuildError, BundleError, CheckpointError
from qie.engines.files import leftovers_of
from qie.engines.inputs.image import load_image
from tests.support.bundles import build, planned
from tests.support.command_line import Qie, Refusal, assert_says


def replaced(path: Path) -> None:
    """Another file of the same size takes the name."""
    tensors = load_file(path)
    save_file({name: values * 1.5 for name, values in tensors.items()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)


@pytest.mark.parametrize("change", [replaced, rewritten])
def test_weights_that_change_during_a_build(bad_checkpoint: Path, tmp_path: Path, change: Any) -> None:
    file = next((bad_checkpoint / "transformer").glob("*.safetensors"))
    done: list[str] = []

    def hook(what: str, *_: Any) -> None:
        if what == "weights of vae" and not done:
            done.append(what)
            change(file)

    with pytest.raises(CheckpointError, match=f"{file.name} was changed while it was read; start again"):
        build(bad_checkpoint, tmp_path / "bundle", progress=hook)
    assert not (tmp_path / "bundle").exists()
    verify(build(bad_checkpoint, tmp_path / "bundle"))


def test_a_lora_that_changes_after_it_was_planned(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    tensors = {
        "proj_out.lora_A.weight": np.ones((1, 64), np.float32),
        "proj_out.lora_B.weight": np.ones((64, 1), np.float32),
    }
    save_file(tensors, path)
    lora = open_lora(path, 1.0)
    lora.digest()
    replaced(path)
    for action in (lora.digest, lambda: lora.delta("proj_out.weight", (64, 64)), open_file(path).names):
        if action.__name__ == "names":
            action()
            continue
        with pytest.raises(CheckpointError, match="l.safetensors was changed while it was read"):
            action()


def test_the_files_of_others_in_a_bundle_stay(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "mine"))
    for name in ("photo.jpg", "schedules/photo.jpg", "more/photo.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        with pytest.raises(BuildError, match=f"mine also holds {name}, which a build would delete; move it away"):
            build(checkpoint, folder)
        with pytest.raises(BundleError, match=f"mine also holds {name}, which is not the bundle's; move it away"):
            remove_bundle(folder)
        (folder / name).unlink()
    verify(build(checkpoint, folder))
    assert remove_bundle(folder)


@pytest.mark.parametrize("name", [".proj.7.tmp", ".proj.20240101.old", ".proj.7.removed"])
def test_hidden_folders_of_others_stay(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "photo.png").write_text("mine")
    build(checkpoint, tmp_path / "proj")
    with pytest.raises(BundleError, match="there is no bundle"):
        open_bundle(tmp_path / "gone")
    assert (tmp_path / name / "photo.png").read_text() == "mine"
    assert leftovers_of(tmp_path) == []
    shutil.rmtree(tmp_path / name)


def test_an_export_beside_whose_files_something_came(checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path / "graphs")
    export_graphs(plan, weights=False)

    def hook(*_: Any) -> None:
        (tmp_path / "graphs" / "notes.txt").write_text("mine")

    with pytest.raises(BuildError, match="graphs holds files that are not exported graphs"):
        export_graphs(plan, weights=True, progress=hook)
    assert (tmp_path / "graphs" / "notes.txt").read_text() == "mine"


def test_caches_of_others_stay(qie_home: Path) -> None:
    (qie_home / "cache" / "mine").mkdir(parents=True)
    (qie_home / "cache" / "tensorrt-rtx").mkdir()
    assert [remove(item) for item in unneeded()] == [True]
    assert (qie_home / "cache" / "mine").is_dir()


@pytest.mark.parametrize("name", [".y.0123456789abcdef.tmp", "b\udcff"])
def test_a_folder_that_no_bundle_can_have(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(BuildError, match="is the name of a temporary folder, or no text in UTF-8"):
        build(checkpoint, tmp_path / name)


# Calibrations and their files


@pytest.mark.parametrize(
    ("options", "said"),
    [(("-o", "photo.png"), "photo.png is not a qie calibration"),
     (("-o", "missing/c.npz"), "name a file in an existing"), (("-o", "."), "name a file in an existing folder"),
     (("-o", "fifo"), "name a file in an existing folder"),
     (("-o", "c.npz", "--sensitivity", "--ranking", "c.npz"), "is the calibration file too"),
     (("-o", "c.npz", "--sensitivity", "--ranking", "missing/x.json"), "name a file in an existing folder")],
)  # fmt: skip
def test_calibrate_refuses_before_the_work(
    qie: Qie, refusal: Refusal, workplace: Path, checkpoint: Path, options: tuple[str, ...], said: str
) -> None:
    os.mkfifo("fifo")
    before = Path("photo.png").read_bytes()
    assert_says(refusal(qie("calibrate", checkpoint, "--images", ".", "--samples", "1", *options)), said)
    assert Path("photo.png").read_bytes() == before
    assert not Path("c.npz").exists()
    Path("fifo").unlink()


def test_a_pipe_among_the_images_is_passed(workplace: Path, checkpoint: Path) -> None:
    from qie.compiler.quantization.samples import read_images

    os.mkfifo("a.png")
    assert len(read_images(Path(), 5)) == 1
    Path("a.png").unlink()


def test_the_number_of_results_is_bounded_at_once(qie: Qie, bundle: Path, workplace: Path) -> None:
    for count in ("257", "5000000000"):
        done = qie("run", "photo.png", "x", "--bundle", bundle, "--num-images", count)
        assert done.returncode == 2
        assert "256" in done.stderr


# Transparency of every kind


def png(path: Path, mode: str, bits: int, transparent: bool) -> Path:
    """A PNG of one pixel, written by hand where Pillow cannot."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    color = {"gray": 0, "rgb": 2}[mode]
    value = {1: 1, 2: 1, 4: 5, 8: 85, 16: 0x1234}[bits]
    channels = 1 if mode == "gray" else 3
    pixel = (
        struct.pack(">H", value) * channels
        if bits == 16
        else bytes([value << (8 - bits) if bits < 8 else value] * channels)
    )
    key = struct.pack(">H", value) * channels
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, bits, color, 0, 0, 0))
    content += chunk(b"tRNS", key) if transparent else b""
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    ("mode", "bits"), [("gray", 1), ("gray", 2), ("gray", 4), ("gray", 8), ("gray", 16), ("rgb", 8), ("rgb", 16)]
)
def test_a_transparent_color_is_white_and_said(tmp_path: Path, mode: str, bits: int) -> None:
    source = load_image(png(tmp_path / "x.png", mode, bits, True))
    assert source.image.getpixel((0, 0)) == (255, 255, 255)
    assert "alpha channel flattened onto white" in source.notes
    opaque = load_image(png(tmp_path / "y.png", mode, bits, False))
    expected = {1: 255, 2: 85, 4: 85, 8: 85, 16: 0x12}[bits]
    assert opaque.image.getpixel((0, 0)) == (expected, expected, expected)
    assert "alpha channel flattened onto white" not in opaque.notes


def test_a_large_image_is_reduced_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qie.engines.inputs.image.REDUCED_PIXELS", 10_000)
    image = Image.new("RGB", (600, 200), (10, 200, 30))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    source = load_image(tmp_path / "x.jpg")
    assert source.image.size == (50, 150)
    assert source.notes == ("600x200 reduced to 150x50", "EXIF orientation applied")
    assert json.dumps(source.image.getpixel((5, 5)))
