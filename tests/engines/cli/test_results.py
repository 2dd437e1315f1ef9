"""The files of a run's results: claimed by one run alone, never an input, and there as soon as they are decoded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qie.engines.cli.results import Results
from qie.engines.errors import ImageError, RequestError
from tests.support.command_line import RUN, Qie, Refusal, assert_says, opened
from tests.support.images import smooth_image
from tests.support.soak import attempts

QIE = (sys.executable, "-c", "from qie.compiler.cli.main import main; main()")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def results(out: str | None = None, *, count: int = 1, overwrite: bool = False) -> Results:
    return Results(None if out is None else Path(out), [Path("photo.png")], count=count, overwrite=overwrite)


def test_names_that_are_taken_are_passed(workplace: Path) -> None:
    Path("photo-edited.png").write_text("mine")
    Path("photo-edited-3.png").mkdir()
    saved = results(count=2)
    for number in (1, 0):
        saved.save(number, smooth_image(32, 32))
    assert saved.paths == {1: Path("photo-edited-2.png"), 0: Path("photo-edited-4.png")}
    assert Path("photo-edited.png").read_text() == "mine"


def test_a_name_that_is_taken_meanwhile_is_passed(workplace: Path) -> None:
    one, other = results(), results()
    one.save(0, smooth_image(32, 32))
    other.save(0, smooth_image(48, 32))
    assert (one.paths[0], other.paths[0]) == (Path("photo-edited.png"), Path("photo-edited-2.png"))
    assert [opened(path).size for path in ("photo-edited.png", "photo-edited-2.png")] == [(32, 32), (48, 32)]


@pytest.mark.parametrize("out", ["photo.png", "./photo.png", "link.png", "hard.png", "sub/../photo.png"])
def test_an_input_is_not_replaced(workplace: Path, out: str) -> None:
    Path("link.png").symlink_to("photo.png")
    Path("hard.png").hardlink_to("photo.png")
    Path("sub").mkdir()
    before = Path("photo.png").read_bytes()
    with pytest.raises(RequestError, match="is one of the images to edit and would be lost; choose another file"):
        results(out)
    assert Path("photo.png").read_bytes() == before
    results(out, overwrite=True).save(0, smooth_image(32, 32))
    assert opened(out).size == (32, 32)


def test_numbered_results_are_no_inputs(workplace: Path) -> None:
    smooth_image(32, 32).save("out-2.png")
    with pytest.raises(RequestError, match="out-2.png is one of the images to edit"):
        Results(Path("out.png"), [Path("photo.png"), Path("out-2.png")], count=3, overwrite=False)


def test_a_link_stays_a_link(workplace: Path) -> None:
    Path("real.png").write_text("old")
    Path("link.png").symlink_to("real.png")
    results("link.png").save(0, smooth_image(32, 32))
    assert Path("link.png").is_symlink()
    assert opened("real.png").size == (32, 32)


@pytest.mark.parametrize("stem", ["o" * 252, "ö" * 126, "o" * 5000, "o\0"])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(workplace: Path, stem: str) -> None:
    with pytest.raises(ImageError, match="is too long for a file, or no name of one; choose another"):
        results(f"{stem}.png")
    with pytest.raises(ImageError, match="is too long for a file"):
        Results(None, [Path(f"{stem}.png")], count=1, overwrite=False)


def test_a_name_as_long_as_can_be(workplace: Path) -> None:
    longest = os.pathconf(".", "PC_NAME_MAX") - len(".png")
    results("o" * longest + ".png").save(0, smooth_image(32, 32))
    with pytest.raises(ImageError, match="is too long"):
        results("o" * (longest + 1) + ".png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_not_replaced(workplace: Path) -> None:
    Path("out.png").write_text("mine")
    Path("out.png").chmod(0o400)
    with pytest.raises(ImageError, match="read-only"):
        results("out.png")


def test_runs_at_once_lose_nothing(bundle: Path, workplace: Path) -> None:
    for _ in range(attempts(1, 3)):
        for left in workplace.glob("*-edited*.png"):
            left.unlink()
        command = [*QIE, "run", "photo.png", "make it red", *RUN, "--bundle", str(bundle), "--seed"]
        running = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(4)]
        told = [process.communicate()[0].strip() for process in running]
        assert sorted(told) == [f"photo-edited{more}.png" for more in ("-2", "-3", "-4", "")]
        contents = [Path(path).read_bytes() for path in told]
        assert len(set(contents)) == 4
        for seed, content in enumerate(contents):
            subprocess.run([*command, str(seed), "-o", "alone.png"], check=True, capture_output=True)
            assert Path("alone.png").read_bytes() == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_decoded_stays_when_the_rest_is_stopped(bundle: Path, workplace: Path, number: int) -> None:
    options = ["--steps", "20", "--cfg", "1", "--num-images", "200", "--seed", "1", "--bundle", str(bundle)]
    command = [*QIE, "run", "photo.png", "make it red", *options, "-o", "out.png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not Path("out-2.png").exists():
            assert running.poll() is None
        running.send_signal(number)
        out, err = running.communicate()
    assert running.returncode == 128 + number
    assert err == "stopped\n"
    written = sorted(path.name for path in workplace.glob("out-*.png"))
    assert 0 < len(written) < 200
    assert set(out.splitlines()) <= set(written)  # but for one whose name was not noted yet
    assert len(written) - 1 <= len(out.splitlines())
    for name in written:
        with Image.open(name) as image:
            image.load()
    assert names(workplace) == sorted([*written, "photo.png"])


def test_the_command_refuses_before_the_work(qie: Qie, refusal: Refusal, bundle: Path, workplace: Path) -> None:
    run = ("run", "photo.png", "x", *RUN, "--bundle", bundle)
    assert_says(refusal(qie(*run, "-o", "photo.png")), r"photo.png is one of the images .*; choose another file")
    assert qie(*run, "-o", "photo.png", "--overwrite").returncode == 0
    assert json.loads(qie(*run, "--json").stdout)["images"][0]["path"] == "photo-edited.png"


def test_an_image_may_come_from_a_pipe(bundle: Path, workplace: Path) -> None:
    command = [*QIE, "run", "/dev/stdin", "make it red", *RUN, "--seed", "1", "--bundle", str(bundle), "-o"]
    subprocess.run([*command, "piped.png"], input=Path("photo.png").read_bytes(), check=True, capture_output=True)
    command[command.index("/dev/stdin")] = "photo.png"
    subprocess.run([*command, "named.png"], check=True, capture_output=True)
    assert Path("piped.png").read_bytes() == Path("named.png").read_bytes()
