"""What this machine is, and which of its GPUs is used."""

import os
import platform
from dataclasses import replace

import pytest

import qie
from qie.engines import gpus
from qie.engines.errors import EngineMismatchError
from qie.engines.gpus import NO_GPU, Gpu
from qie.engines.machine import Machine, choose_gpu, this_machine, version_of
from tests.support.libcuda import Libcuda, StandIn

L40S = Gpu(index=0, name="NVIDIA L40S", compute_capability="8.9", memory_gib=44.3)
A100 = Gpu(index=1, name="NVIDIA A100", compute_capability="8.0", memory_gib=79.3)
SECOND = replace(L40S, index=2)


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.cores <= (os.cpu_count() or 1)
    assert 0 < machine.memory_gib < 2**20
    assert machine.system == f"{platform.system()} {platform.release()}"
    assert machine.cpu


def test_its_gpus_are_those_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    driver = Libcuda([StandIn(name="NVIDIA L40S", capability="8.9"), StandIn(name="NVIDIA A100", capability="8.0")])
    monkeypatch.setattr(gpus, "libcuda", lambda: driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine = this_machine()
    assert [(gpu.index, gpu.name) for gpu in machine.gpus] == [(0, "NVIDIA A100")]
    assert (machine.cuda, machine.no_gpu) == ("12.8", None)


def machine(*found: Gpu) -> Machine:
    return Machine(system="test", cpu="test", cores=1, memory_gib=1.0, gpus=found)


@pytest.mark.parametrize(
    ("capability", "device", "expected"),
    [("8.9", None, L40S), ("8.0", None, A100), ("8.9", 2, SECOND), ("8.0", 1, A100), ("8.9", 0, L40S)],
)
def test_the_gpu_that_is_used(capability: str, device: int | None, expected: Gpu) -> None:
    assert choose_gpu(machine(L40S, A100, SECOND), capability, device) == expected


@pytest.mark.parametrize(
    ("found", "device", "problem"),
    [
        ((L40S, A100, SECOND), 1, "GPU 1 is NVIDIA A100 (8.0); choose GPU 0 or GPU 2"),
        ((A100,), 1, "GPU 1 is NVIDIA A100 (8.0); build for that GPU with a recipe of `qie recipes`"),
        ((L40S, A100), 3, "there is no GPU 3, where GPU 0 is NVIDIA L40S, GPU 1 is NVIDIA A100; choose one of these"),
        ((A100, A100), None, "this machine has NVIDIA A100 (8.0); build for that GPU with a recipe of `qie recipes`"),
        ((), None, NO_GPU),
        ((), 0, NO_GPU),
    ],
)
def test_a_gpu_that_cannot_be_used(found: tuple[Gpu, ...], device: int | None, problem: str) -> None:
    with pytest.raises(EngineMismatchError) as refused:
        choose_gpu(machine(*found), "8.9", device)
    assert str(refused.value) == f"the engines are built for compute capability 8.9, and {problem}"
    assert refused.value.option == (None if device is None else "device")


def test_versions() -> None:
    assert version_of("qie") == qie.__version__
    assert version_of("no-such-package-anywhere") is None
