"""A bundle that is replaced or deleted while an editor has it open: the edit is the old bundle's, to the last byte."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import open_bundle, remove_bundle, verify
from qie.engines.bundle.manifest import Residency
from qie.engines.editing.request import Edit, Request
from tests.support.bundles import build, linked
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image
from tests.support.soak import spread

STAGES = ("vision", "language", "encode", "modulation", "denoise", "decode")
ACTIONS = ("build", "rm", "rm and build", "build twice")
REQUEST = Request(
    images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[1], steps=7, guidance=1.0, size=(64, 64)
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints A and B of one architecture, whose bundles have files of the same sizes."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        write_checkpoint(folder / name, ARCHITECTURES["tiny"], seed=seed)
    return folder


@pytest.fixture(scope="module")
def bundles(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle of each model; not to be changed."""
    folder = tmp_path_factory.mktemp("bundles")
    return {name: build(models / name, folder / name).path for name in "AB"}


@pytest.fixture(scope="module")
def pure(bundles: dict[str, Path]) -> dict[str, bytes]:
    """What each model makes of the request."""
    return {name: image(uncached_editor(open_bundle(str(path))).edit(REQUEST)) for name, path in bundles.items()}


def image(edit: Edit) -> bytes:
    return edit.images[0].tobytes()


@pytest.fixture
def same(bundles: dict[str, Path], qie_home: Path) -> Iterator[Path]:
    """The bundle "same" of model A; in the end nothing is left beside it."""
    path = qie_home / "bundles" / "same"
    path.parent.mkdir(parents=True)
    linked(bundles["A"], path)
    yield path
    gc.collect()
    assert [left.name for left in path.parent.iterdir() if left.name.startswith(".")] == []


def act(action: str, models: Path, path: Path) -> None:
    if "rm" in action:
        remove_bundle(path)
    if "build" in action:
        build(models / "B", path)
    if "twice" in action:
        build(models / "A", path)
        build(models / "B", path)


MOMENTS = [
    (stage, action, residency)
    for residency in ("resident", "sequential")
    for action in ACTIONS
    for stage in ("before", *STAGES, "between")
]


@pytest.mark.parametrize(("moment", "action", "residency"), spread(MOMENTS, 4))
def test_an_editor_stays_with_what_it_opened(
    models: Path, pure: dict[str, bytes], same: Path, moment: str, action: str, residency: Residency
) -> None:
    done: list[str] = []

    def hook(stage: str, *_: Any) -> None:
        if stage == moment and not done:
            done.append(stage)
            act(action, models, same)

    editor = uncached_editor(open_bundle("same"), residency=residency)
    if moment == "between":
        assert image(editor.edit(REQUEST)) == pure["A"]
    if moment in ("before", "between"):
        act(action, models, same)
    edit = editor.edit(REQUEST, progress=hook)
    assert image(edit) == pure["A"]
    assert any("was replaced or deleted meanwhile" in note for note in edit.notes)
    assert image(editor.edit(REQUEST)) == pure["A"]
    editor.close()
    del editor, hook
    if action != "rm":
        verify(open_bundle("same"))
        assert image(uncached_editor(open_bundle("same")).edit(REQUEST)) == pure["B"]
    build(models / "A", same)  # whose tables must be those of A again
    verify(open_bundle("same"))
    assert image(uncached_editor(open_bundle("same")).edit(REQUEST)) == pure["A"]


def test_a_running_command_stays_with_what_it_opened(models: Path, same: Path, workplace: Path) -> None:
    """In processes of their own: an edit of many steps, and rebuilds beside it."""
    command = [
        sys.executable,
        "-c",
        "from qie.compiler.cli.main import main; main()",
        "run",
        "photo.png",
        "make it red",
    ]
    options = ["--bundle", "same", "--seed", "1", "--cfg", "1", "--steps"]
    subprocess.run([*command, *options, "400", "-o", "alone.png"], check=True, capture_output=True)
    with subprocess.Popen(
        [*command, *options, "400", "-o", "beside.png"], stderr=subprocess.PIPE, text=True
    ) as running:
        rebuilt = 0
        while running.poll() is None:
            build(models / "BA"[rebuilt % 2], same)
            rebuilt += 1
        assert running.returncode == 0, running.stderr and running.stderr.read()
    assert rebuilt
    # whichever of the two the command opened, all of it is of that one
    build(models / "B", same)
    subprocess.run([*command, *options, "400", "-o", "other.png"], check=True, capture_output=True)
    assert (workplace / "beside.png").read_bytes() in [
        (workplace / name).read_bytes() for name in ("alone.png", "other.png")
    ]


def test_there_is_a_bundle_at_every_moment(models: Path, same: Path) -> None:
    reads = (
        "import sys; from qie.engines.bundle.bundle import open_bundle\n"
        "for _ in range(int(sys.argv[1])): open_bundle('same')"
    )
    with subprocess.Popen([sys.executable, "-c", reads, "300"]) as reading:
        while reading.poll() is None:
            for name in "BA":
                build(models / name, same)
    assert reading.returncode == 0
