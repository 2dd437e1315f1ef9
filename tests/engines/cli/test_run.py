"""``qie run``: what it writes, and what it prints where."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import RUN, Qie, opened, pixels
from tests.support.fake_gpu import Gpu


def test_stdout_is_the_path_alone(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "make it red", "-o", "red.png", "--seed", "7", "--bundle", bundle)
    assert done.returncode == 0
    assert done.stdout == "red.png\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "tiny: the weights are random, so an edit shows that everything runs, but only noise"
    assert lines[1].startswith("tiny (tiny-cpu), 160x96, 20 steps, guidance 4 away from ' ', ")
    assert lines[2:] == ["seed 7: "]
    assert "%" not in done.stderr and "\x1b" not in done.stderr


def test_run_on_a_gpu_that_was_chosen(
    qie: Qie,
    workplace: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    gpu = Gpu(count=2)
    gpu.install(monkeypatch, "tensorrt")
    folder = gpu.retarget(bundle, tmp_path / "gpu", "tensorrt")
    for device in (0, 1):
        done = qie("run", "photo.png", "x", "--bundle", folder, *RUN, "--device", str(device))
        assert (done.returncode, gpu.device) == (0, device), done.stderr
    assert refusal(qie("run", "photo.png", "x", "--bundle", folder, *RUN, "--device", "5")) == (
        "vision is built for tensorrt/8.9, and there is no GPU 5, where GPU 0 is Fake L40S, GPU 1 is Fake L40S; choose "
        "one of these (--device)"
    )
    assert "are for the CPU, and GPU 0 was chosen; choose none" in refusal(
        qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--device", "0")
    )


def test_run_as_json(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "make it red", "--seed", "7", "--bundle", bundle, "--steps", "2", "--json")
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    seconds = answer.pop("seconds")
    assert "random" in answer.pop("about")
    assert answer == {
        "images": [{"path": "photo-edited.png", "seed": 7, "width": 160, "height": 96}],
        "instruction": "make it red",
        "negative": " ",
        "bundle": str(bundle),
        "model": "tiny",
        "generated_size": {"width": 160, "height": 96},
        "steps": 2,
        "guidance": 4.0,
        "notes": [],
    }
    assert set(seconds) == {"vision", "language", "encode", "modulation", "denoise", "decode"}


def test_run_as_json_without_guidance(qie: Qie, workplace: Path, bundle: Path) -> None:
    answer = json.loads(qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--json").stdout)
    assert answer["guidance"] is None
    assert answer["negative"] is None


def test_no_file_is_overwritten_without_being_named(qie: Qie, workplace: Path, bundle: Path) -> None:
    Path("photo-edited.png").write_text("mine")
    Path("photo-edited-3.png").write_text("mine too")
    first = qie("run", "photo.png", "x", "--bundle", bundle, *RUN)
    assert first.stdout == "photo-edited-2.png\n"
    several = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--num-images", "2")
    assert several.stdout.splitlines() == ["photo-edited-4.png", "photo-edited-5.png"]
    assert Path("photo-edited.png").read_text() == "mine"
    assert Path("photo-edited-3.png").read_text() == "mine too"


def test_several_results_have_consecutive_seeds(qie: Qie, workplace: Path, bundle: Path) -> None:
    common = ("run", "photo.png", "make it red", "--bundle", bundle, *RUN)
    done = qie(*common, "--seed", "5", "--num-images", "3", "-o", "out.png")
    assert done.stdout.splitlines() == ["out-1.png", "out-2.png", "out-3.png"]
    assert re.findall(r"seed (\d+): ", done.stderr) == ["5", "6", "7"]
    assert not Path("out.png").exists()
    assert qie(*common, "--seed", "6", "-o", "six.png").returncode == 0
    assert np.array_equal(pixels("six.png"), pixels("out-2.png"))
    assert not np.array_equal(pixels("out-1.png"), pixels("out-2.png"))


def test_drawn_seeds_are_told_and_consecutive(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--num-images", "2", "--json")
    first, second = (image["seed"] for image in json.loads(done.stdout)["images"])
    assert second == first + 1
    repeated = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--seed", str(first), "-o", "again.png")
    assert repeated.returncode == 0
    assert np.array_equal(pixels("again.png"), pixels("photo-edited.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_same_seed_gives_the_same_bytes(qie: Qie, workplace: Path, bundle: Path, suffix: str) -> None:
    for name in ("a", "b"):
        words = ("--seed", "3", "-o", f"{name}.{suffix}", "--bundle", bundle, "--steps", "2")
        assert qie("run", "photo.png", "make it red", *words).returncode == 0
    assert Path(f"a.{suffix}").read_bytes() == Path(f"b.{suffix}").read_bytes()
    other = ("--seed", "4", "-o", f"c.{suffix}", "--bundle", bundle, "--steps", "2")
    assert qie("run", "photo.png", "make it red", *other).returncode == 0
    assert Path(f"a.{suffix}").read_bytes() != Path(f"c.{suffix}").read_bytes()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_match_input_gives_the_size_that_a_viewer_shows(
    qie: Qie, workplace: Path, bundle: Path, orientation: int
) -> None:
    image = opened("photo.png")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save("turned.jpg", exif=exif)
    done = qie("run", "turned.jpg", "x", "--bundle", bundle, *RUN, "--match-input", "-o", "out.png")
    assert done.returncode == 0
    assert opened("out.png").size == ((90, 150) if orientation == 6 else (150, 90))
    assert ("note: turned.jpg: EXIF orientation applied" in done.stderr) == (orientation != 1)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("alpha.png", "alpha channel flattened onto white"),
        ("deep.png", "16-bit reduced to 8-bit"),
        ("gray.png", "grayscale expanded to RGB"),
        ("photo.jpg", None),
        ("photo.webp", None),
        ("alpha.webp", "alpha channel flattened onto white"),
    ],
)
def test_kinds_of_images(qie: Qie, workplace: Path, bundle: Path, name: str, note: str | None) -> None:
    image = opened("photo.png")
    if name.startswith("alpha"):
        image.putalpha(128)
    elif name.startswith("gray"):
        image = image.convert("L")
    elif name.startswith("deep"):
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.save(name)
    done = qie("run", name, "make it red", "--bundle", bundle, *RUN, "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert pixels("out.png").shape == (96, 160, 3)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert (f"note: {name}: {note}" in notes) if note else notes == []


@pytest.mark.parametrize(
    ("wanted", "made", "reason"),
    [
        ("96x64", (96, 64), None),
        ("100x70", (96, 64), "sides are multiples of 16 pixels"),
        ("1024X1024", (128, 128), "the nearest bucket: this bundle takes sides of at most 192 pixels"),
        ("2000x500", (192, 96), "the nearest bucket"),
        ("16x16", (128, 128), "the nearest bucket: this bundle takes sides of at least 32 pixels"),
    ],
)
def test_size(qie: Qie, workplace: Path, bundle: Path, wanted: str, made: tuple[int, int], reason: str | None) -> None:
    done = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--size", wanted, "-o", "out.png")
    assert opened("out.png").size == made
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert f"the image is encoded at 160x96 and the result is {made[0]}x{made[1]}" in notes[-1]
    assert len(notes) == (1 if reason is None else 2)
    if reason is not None:
        note = notes[0]
        assert note.startswith(f"note: requested {wanted.lower()}, using {made[0]}x{made[1]}")
        assert reason in note


def test_embeddings_are_kept_on_disk_by_choice(qie: Qie, workplace: Path, bundle: Path, qie_home: Path) -> None:
    common = ("--bundle", bundle, *RUN, "--seed", "1")
    assert qie("run", "photo.png", "make it red", *common, "-o", "plain.png").returncode == 0
    assert not (qie_home / "encoder").exists()
    for instruction, said in (("make it red", ""), ("make it blue", ", vision from the cache"),
                              ("make it red", ", vision and language from the cache")):  # fmt: skip
        done = qie("run", "photo.png", instruction, *common, "--encoder-cache", "-o", "cached.png")
        assert re.search(rf"no guidance, [\d.]+ m?s{said}$", done.stderr, re.MULTILINE), done.stderr
    assert Path("cached.png").read_bytes() == Path("plain.png").read_bytes()
    assert len(list((qie_home / "encoder").glob("*/*"))) == 3
    again = json.loads(qie("run", "photo.png", "make it red", *common, "--encoder-cache", "--json").stdout)
    assert set(again["seconds"]) == {"encode", "modulation", "denoise", "decode"}
    without = json.loads(qie("run", "photo.png", "make it red", *common, "--json").stdout)
    assert set(without["seconds"]) - set(again["seconds"]) == {"vision", "language"}


def test_several_images(qie: Qie, workplace: Path, bundle: Path) -> None:
    """The last one gives the size; all of them count."""
    opened("photo.png").rotate(90, expand=True).save("tall.png")
    common = ("make it red", "--bundle", bundle, *RUN, "--seed", "1")
    assert qie("run", "photo.png", "tall.png", *common).stdout == "tall-edited.png\n"
    assert pixels("tall-edited.png").shape == (160, 96, 3)
    qie("run", "photo.png", "photo.png", "tall.png", *common, "-o", "three.png")
    assert not np.array_equal(pixels("three.png"), pixels("tall-edited.png"))


def test_the_newest_bundle_is_the_default(qie: Qie, workplace: Path, named_bundle: str, qie_home: Path) -> None:
    older = qie_home / "bundles" / "older"
    shutil.copytree(qie_home / "bundles" / named_bundle, older)
    os.utime(older / "manifest.json", (1, 1))
    answer = json.loads(qie("run", "photo.png", "x", *RUN, "--json").stdout)
    assert answer["bundle"] == str(qie_home / "bundles" / named_bundle)
    os.utime(older / "manifest.json", (2**32, 2**32))
    answer = json.loads(qie("run", "photo.png", "x", *RUN, "--json").stdout)
    assert answer["bundle"] == str(older)


def test_bars_are_drawn_on_a_terminal(workplace: Path, bundle: Path) -> None:
    master, slave = pty.openpty()
    script = "from qie.compiler.cli.main import main; main()"
    words = ("run", "photo.png", "make it red", "--bundle", str(bundle), "--steps", "3", "--cfg", "1")
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as running:
        os.close(slave)
        drawn = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            drawn += piece
        assert running.stdout is not None
        assert running.stdout.read() == "photo-edited.png\n"
    os.close(master)
    assert running.returncode == 0
    text = drawn.decode()
    for stage in ("vision", "language", "encode", "denoise", "decode"):
        assert re.search(rf"{stage}\b.*?100%", text, re.DOTALL), stage
