"""What the tests share: a small checkpoint, a bundle of it, a home of their own, and the command line."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess, run

import pytest

from qie.compiler.cli.main import STOPPING, main
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.recipe.schema import to_toml
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from tests.support.bundles import build, linked
from tests.support.damage import change_manifest
from tests.support.images import smooth_image
from tests.support.threads import one_thread_in_libraries, one_thread_in_onnxruntime


def pytest_configure() -> None:
    one_thread_in_libraries()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is marked with ``soak`` to ``make test-soak``."""
    if not os.environ.get("QIE_SOAK"):
        long = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's is read or written, not even by what is made once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QIE_HOME", str(tmp_path_factory.mktemp("session-home")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "100")
        one_thread_in_onnxruntime(patch)
        yield


@pytest.fixture(autouse=True)
def qie_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for every test."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("QIE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the architecture of 2511; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", ARCHITECTURES["tiny"], seed=1)


@pytest.fixture(scope="session")
def plain_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of ``checkpoint`` for the CPU; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("plain") / "tiny-cpu").path


@pytest.fixture(scope="session")
def bundle(plain_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain_bundle`` with results in batches of four; not to be changed."""
    path = linked(plain_bundle, tmp_path_factory.mktemp("bundle") / "tiny-cpu")
    manifest = json.loads((path / "manifest.json").read_text())
    recipe = parse_recipe(manifest["recipe"]["toml"], path)
    recipe = replace(recipe, shapes=replace(recipe.shapes, batch=replace(recipe.shapes.batch, max=4)))
    change_manifest(
        path,
        limits=manifest["limits"] | {"batch_max": 4},
        recipe=manifest["recipe"] | {"toml": to_toml(recipe), "sha256": recipe.digest()},
    )
    return path


@pytest.fixture(scope="session")
def pocket_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the pocket model for the CPU; not to be changed."""
    return build("pocket", tmp_path_factory.mktemp("pocket") / "pocket-cpu").path


@pytest.fixture(scope="session")
def edit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the first generation, which takes one image; not to be changed."""
    folder = tmp_path_factory.mktemp("edit")
    checkpoint = write_checkpoint(folder / "tiny-edit", ARCHITECTURES["tiny-edit"], seed=1)
    return build(checkpoint, folder / "edit-cpu").path


@pytest.fixture
def named_bundle(bundle: Path, qie_home: Path) -> str:
    """The name of a bundle in the home of this test; its files may be changed."""
    shutil.copytree(bundle, qie_home / "bundles" / "mine")
    return "mine"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with an image in it: photo.png, 150 x 90 pixels."""
    smooth_image(150, 90).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts the handlers of signals back that ``main`` sets in this process; an ignored one would go to its children."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def qie(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CompletedProcess[str]]:
    """The command line in this process: ``qie("run", photo, "make it red")``."""

    def call(*words: str | Path) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["qie", *map(str, words)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        with pytest.raises(SystemExit) as stopped:
            main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return CompletedProcess(sys.argv, stopped.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def process() -> Callable[..., CompletedProcess[str]]:
    """The command line in a process of its own; ``before`` are the words of a command that starts it."""

    def call(*words: str | Path, before: tuple[str, ...] = ()) -> CompletedProcess[str]:
        command = [*before, sys.executable, "-c", "from qie.compiler.cli.main import main; main()", *map(str, words)]
        return run(command, capture_output=True, text=True, check=False, timeout=60)

    return call


@pytest.fixture(scope="session")
def refusal() -> Callable[[CompletedProcess[str]], str]:
    """The one sentence that a refused command says: exit code 2, a line on stderr, no traceback."""

    def read(done: CompletedProcess[str]) -> str:
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: "), done.stderr
        assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("error: ").rstrip("\n")

    return read
