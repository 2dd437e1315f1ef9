"""Builds that are killed at random moments: none leaves a bundle that is wrong, and the next one makes the same bundle.

The moments are random, so that a failure names the one it was found at. The compiler numbers some of the values that
it makes in the order of their addresses, so that two engines of one graph differ in a few bytes, and in size by a few,
whether a build was killed or not: of an engine, its structure is compared, and its size within ``NUMBERS`` bytes.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.engines.bundle.bundle import bundles, open_bundle, remove_bundle, verify
from qie.engines.bundle.manifest import Manifest
from qie.engines.errors import BundleError
from qie.engines.files import leftovers_of

pytest.importorskip("tensorrt_rtx")

NUMBERS = 1024
"""Bytes by which the numbers in two engines of one graph may differ: 8 were seen in 42 MB."""

SCRIPT = "from qie.compiler.cli.main import main; main()"


def start(*words: str | Path) -> "subprocess.Popen[bytes]":
    """Start ``qie build`` of the bundle "mine"."""
    command = [sys.executable, "-c", SCRIPT, "build", *map(str, words), "--name", "mine"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def seconds_to(*words: str | Path, where: str = "the first build") -> float:
    """Seconds of a build that nothing interrupts."""
    begun = time.monotonic()
    with start(*words) as running:
        _, said = running.communicate()
    assert running.returncode == 0, f"{where}: {said.decode()}"
    return time.monotonic() - begun


def content() -> tuple[Manifest, list[int]]:
    """What is in the bundle "mine", whose files are as its manifest says, but for what differs from build to build.

    The second is the sizes of the engines' files.
    """
    bundle = open_bundle("mine")
    verify(bundle)
    engines = [
        replace(
            engine,
            build_seconds=0.0,
            build_peak_bytes=0,
            files=tuple(replace(file, bytes=0, sha256="0" * 64) for file in engine.files),
        )
        for engine in bundle.manifest.engines
    ]
    assert all(engine.structure is not None for engine in engines)
    sizes = [file.bytes for engine in bundle.manifest.engines for file in engine.files]
    return replace(bundle.manifest, engines=tuple(engines)), sizes


def check_content(wanted: tuple[Manifest, list[int]], where: str) -> None:
    """Check that the bundle "mine" holds what is wanted."""
    manifest, sizes = content()
    assert manifest == wanted[0], where
    assert sizes == [pytest.approx(size, abs=NUMBERS) for size in wanted[1]], where


def kill_often(times: int, qie_home: Path, *words: str | Path, calibrating: int) -> None:
    """Kill the build ``times`` times, each at a random moment, and complete it every time.

    The first ``calibrating`` of them make the calibration, the others find it.
    """
    limit = seconds_to(*words)
    wanted = content()
    for number in range(times):
        remove_bundle(qie_home / "bundles" / "mine")
        if number < calibrating:
            shutil.rmtree(qie_home / "calibrations", ignore_errors=True)
        elif number == calibrating:
            limit = seconds_to(*words)
            check_content(wanted, "a build that finds its calibration")
            remove_bundle(qie_home / "bundles" / "mine")
        moment = random.uniform(0, limit)
        with start(*words) as running:
            try:
                running.wait(moment)
            except subprocess.TimeoutExpired:
                running.kill()
        where = f"kill {number + 1}, after {moment:.3f} of {limit:.3f} s"
        assert running.returncode in (0, -signal.SIGKILL), where
        if bundles():
            check_content(wanted, where)
        else:
            with pytest.raises(BundleError):
                open_bundle("mine")
        seconds_to(*words, where=where)
        check_content(wanted, where)
        assert leftovers_of(qie_home / "bundles") == [], where


@pytest.mark.soak
def test_a_build_of_pocket(qie_home: Path) -> None:
    kill_often(50, qie_home, "pocket", "--gpu", "l40s", calibrating=50)


@pytest.mark.soak
def test_a_build_of_four_blocks_of_the_published_width(tmp_path: Path, qie_home: Path) -> None:
    """Weights and engines of a checkpoint whose shards are made on demand; two of ten builds calibrate."""
    planned = plan_synthesis("2511", tmp_path / "four", layers=4, language_layers=2, on_demand=True)
    recipe = tmp_path / "all.toml"
    recipe.write_text('extends = "l40s"\n[components.transformer]\nexclude = []\n')
    kill_often(10, qie_home, synthesize(planned), "--gpu", recipe, "--stream", calibrating=2)
