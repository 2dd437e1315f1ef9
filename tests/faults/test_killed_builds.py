"""Builds that are killed leave nothing that loads."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_line import RUN, Qie, Refusal, assert_says


def start_and_kill(checkpoint: Path, qie_home: Path, pattern: str) -> None:
    """Start a long build of the bundle "mine" and kill it when there is a file ``pattern`` in a hidden folder of it."""
    schedules = "".join(f"[[schedules]]\nsteps = {n}\nguidance = 4.0\n" for n in range(700, 900))
    Path("long.toml").write_text(f'extends = "cpu"\n{schedules}')
    words = ["build", str(checkpoint), "--gpu", "long.toml", "--name", "mine", "--overwrite"]
    script = "from qie.compiler.cli.main import main; main()"
    with subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.DEVNULL) as running:
        while not list(qie_home.glob(f"bundles/.mine.*/{pattern}")):
            assert running.poll() is None
            time.sleep(0.002)
        running.kill()
    assert running.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("pattern", ["*", "*/transformer.weights*", "*/piece.json", "*/schedules/*"])
def test_killed_build(qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, pattern: str) -> None:
    start_and_kill(checkpoint, qie_home, pattern)
    (leftover,) = names(qie_home / "bundles")
    assert leftover.startswith(".mine.")
    assert qie("list").stdout.startswith("no bundles in ")
    assert json.loads(qie("doctor", "--json").stdout)["bundles"] == []
    for which in ((), ("--bundle", "mine"), ("--bundle", leftover), ("--bundle", qie_home / "bundles" / leftover)):
        assert_says(refusal(qie("run", "photo.png", "x", *which)), "there is no bundle")
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(qie_home / "bundles") == ["mine"]
    assert qie("run", "photo.png", "x", *RUN, "-o", "out.png").returncode == 0


def test_killed_rebuild_leaves_the_earlier_bundle(qie: Qie, checkpoint: Path, qie_home: Path) -> None:
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    start_and_kill(checkpoint, qie_home, "*/schedules/*")
    listed = json.loads(qie("list", "--json").stdout)["bundles"]
    assert [(row["name"], row["problem"], row["recipe"]) for row in listed] == [("mine", None, "cpu")]
    assert qie("inspect", "mine", "--verify").returncode == 0
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(qie_home / "bundles") == ["mine"]


def test_a_build_killed_between_two_renames_is_put_back(
    qie: Qie, bundle: Path, checkpoint: Path, qie_home: Path
) -> None:
    """The earlier bundle was moved aside, the new one was not there yet."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    folder = qie_home / "bundles"
    shutil.copytree(bundle, folder / f".mine.{gone.pid}.old")
    shutil.copytree(bundle, folder / f".mine.{gone.pid}.tmp")
    before = json.loads((bundle / "manifest.json").read_text())
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(folder) == ["mine"]
    after = json.loads((folder / "mine" / "manifest.json").read_text())
    assert [e["build_seconds"] for e in after["engines"]] == [e["build_seconds"] for e in before["engines"]]
