"""What this machine is, and what is made of what a driver says."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

import qie
from qie.engines.machine import this_machine, version_of

Driver = Callable[[str], None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an nvidia-smi that is this script, and no other program, where programs are looked for."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.cores <= (os.cpu_count() or 1)
    assert 0 < machine.memory_gib < 2**20
    assert machine.system == f"{platform.system()} {platform.release()}"
    assert machine.cpu


def test_without_a_driver(driver: Driver) -> None:
    assert this_machine().gpus == ()


def test_gpus(driver: Driver) -> None:
    driver('echo "NVIDIA L40S, 8.9, 46068, 570.86.15"; echo "NVIDIA GB10, 12.1, [N/A], 580.95.05"')
    found = [(gpu.name, gpu.compute_capability, gpu.memory_gib, gpu.driver) for gpu in this_machine().gpus]
    assert found == [("NVIDIA L40S", "8.9", 45.0, "570.86.15"), ("NVIDIA GB10", "12.1", None, "580.95.05")]


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'No devices were found'", "echo 'NVIDIA-SMI has failed'; exit 1", "true", "echo 'a, b'"],
)
def test_a_driver_that_does_not_work(driver: Driver, script: str) -> None:
    driver(script)
    assert this_machine().gpus == ()


def test_versions() -> None:
    assert version_of("qie") == qie.__version__
    assert version_of("no-such-package-anywhere") is None
