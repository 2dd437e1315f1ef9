"""Builders that share a home and not their process numbers: containers, pods, hosts, and threads."""

import gc
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import open_bundle, verify
from tests.support.bundles import build
from tests.support.soak import attempts

NEW = ("unshare", "--pid", "--fork", "--mount-proc")
QIE = (sys.executable, "-c", "from qie.compiler.cli.main import main; main()")


def can_unshare() -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run([*NEW, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        write_checkpoint(folder / name / "model", ARCHITECTURES["tiny"], seed=seed)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="needs root and unshare(1) for namespaces of process numbers")
@pytest.mark.parametrize("earlier", [False, True], ids=["empty home", "rebuild"])
def test_two_containers_build_one_name(models: Path, qie_home: Path, earlier: bool) -> None:
    path = qie_home / "bundles" / "mine"
    for delay in range(attempts(1, 10)):
        shutil.rmtree(path, ignore_errors=True)
        if earlier:
            build(models / "A" / "model", path)
        running = []
        for name in "AB":
            words = ("build", str(models / name / "model"), "--name", "mine")
            running.append(subprocess.Popen([*NEW, *QIE, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
            if name == "A":
                with suppress(subprocess.TimeoutExpired):
                    running[0].wait(0.3 + 0.15 * delay)
        said = [process.communicate()[0].decode() for process in running]
        assert [process.returncode for process in running] == [0, 0], said
        verify(open_bundle("mine"))
        assert [left.name for left in path.parent.iterdir()] == ["mine"]


def test_threads_build_one_name(models: Path, qie_home: Path) -> None:
    path = qie_home / "bundles" / "mine"
    with ThreadPoolExecutor(3) as pool:
        for bundle in pool.map(lambda name: build(models / name / "model", path), "ABA"):
            del bundle
    gc.collect()  # the last reader of a bundle that was replaced deletes it
    verify(open_bundle("mine"))
    assert [left.name for left in path.parent.iterdir()] == ["mine"]
