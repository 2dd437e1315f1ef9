"""Signals, closed streams and what nobody expected: a word or a sentence, the right exit code, nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.files import leftovers_of
from tests.support.command_line import RUN, Qie
from tests.support.damage import change_manifest
from tests.support.soak import attempts

CODE = "from qie.compiler.cli.main import main; main()"
QIE = (sys.executable, "-c", CODE)
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose build takes seconds."""
    return write_checkpoint(tmp_path_factory.mktemp("demo") / "demo", ARCHITECTURES["demo"])


def stop(
    command: list[str], number: int, ready: Callable[[], object], delay: float = 0
) -> subprocess.CompletedProcess[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while not ready():
            assert running.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        running.send_signal(number)
        out, err = running.communicate()
    return subprocess.CompletedProcess(command, running.returncode, out, err)


@pytest.mark.parametrize("number", STOPS)
def test_a_build_that_is_stopped(demo: Path, qie_home: Path, number: int) -> None:
    bundles = qie_home / "bundles"
    done = stop([*QIE, "build", str(demo), "--name", "x"], number, lambda: list(bundles.glob(".x.*")))
    assert (done.returncode, done.stderr) == (128 + number, "stopped\n")
    assert list(bundles.iterdir()) == []


@pytest.mark.slow
def test_moments_of_a_run(bundle: Path, workplace: Path) -> None:
    """From the first imports to the last file: stopped, or done; an image whole or absent."""
    command = [*QIE, "run", "photo.png", "make it red", *RUN, "--bundle", str(bundle), "-o", "out.png"]
    for attempt in range(attempts(6, 60)):
        Path("out.png").unlink(missing_ok=True)
        number = STOPS[attempt % 3]
        done = stop(command, number, lambda: True, delay=0.12 + 0.6 * attempt / attempts(6, 60))
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 128 + number), done.stderr
        if Path("out.png").exists():
            assert Path("out.png").read_bytes().endswith(b"IEND\xaeB\x60\x82")
        assert leftovers_of(workplace) == []


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1)")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container(demo: Path, qie_home: Path, number: int) -> None:
    """Whose signals the kernel drops unless they are handled."""
    bundles = qie_home / "bundles"
    command = ["unshare", "--pid", "--fork", "--kill-child", *QIE, "build", str(demo), "--name", "y"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as outer:
        while not list(bundles.glob(".y.*")):
            assert outer.poll() is None
            time.sleep(0.002)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
        assert outer.wait(10) == 128 + number
        assert outer.stderr is not None and outer.stderr.read() == "stopped\n"
    assert list(bundles.iterdir()) == []


def test_a_deletion_that_is_stopped_frees_the_name(qie: Qie, bundle: Path, qie_home: Path) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "mine")
    stop([*QIE, "rm", "mine", "--yes"], signal.SIGTERM, lambda: True, delay=0.25)
    assert qie("list").returncode == 0
    shutil.copytree(bundle, qie_home / "bundles" / "mine", dirs_exist_ok=True)
    assert qie("rm", "mine", "--yes").returncode == 0
    assert list((qie_home / "bundles").iterdir()) == []


def test_a_reader_that_leaves_early(named_bundle: str) -> None:
    shell = f"{sys.executable} -c '{CODE}' inspect mine | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(bundle: Path, workplace: Path, closed: str) -> None:
    words = f"run photo.png red --steps 1 --cfg 1 --bundle {bundle} -o out.png"
    shell = f"{sys.executable} -c '{CODE}' {words} {closed}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1"])
@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", "模型 é \u202e.png".encode(), b"a\nb.png", b"-photo.png", b"\x1b[31m.png"]
)
def test_names_of_any_bytes(bundle: Path, workplace: Path, encoding: str, name: bytes) -> None:
    shutil.copy("photo.png", name)
    options = [*RUN, "--bundle", str(bundle)]
    done = subprocess.run(
        [*QIE, "run", *options, "--", b"./" + name, "red"], capture_output=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    Path(os.fsdecode(name.removesuffix(b".png")) + "-edited.png").unlink()


def test_what_nobody_expected(qie: Qie, bundle: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("vision")

    monkeypatch.setattr("qie.engines.editing.edit.resolve", fail)
    done = qie("run", "photo.png", "x", "--bundle", bundle)
    assert done.returncode == 70
    assert done.stderr.startswith("error: this is a bug of qie (KeyError: 'vision', in engines/")
    assert "; report it with this line, the command and the output of `qie doctor`" in done.stderr
    assert done.stderr.count("\n") == 1
    monkeypatch.setenv("QIE_DEBUG", "1")
    assert "Traceback" in qie("run", "photo.png", "x", "--bundle", bundle).stderr


def test_what_a_file_says_does_not_control_the_terminal(qie: Qie, bundle: Path, workplace: Path) -> None:
    shutil.copytree(bundle, "evil")
    model = json.loads(Path("evil/manifest.json").read_text())["model"]
    hostile = "\x1b]0;title\x07\x1b[2J\u202e\x9b31mevil\nerror: fake"
    change_manifest(Path("evil"), model=model | {"name": hostile, "about": hostile})
    for words in (("inspect", "evil"), ("run", "photo.png", "x", *RUN, "--bundle", "evil", "-o", "out.png")):
        done = qie(*words)
        assert done.returncode == 0, done.stderr
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.stdout + done.stderr)
    assert not {"\x1b", "\x9b", "\u202e"} & set(qie("inspect", "evil", "--json").stdout)
