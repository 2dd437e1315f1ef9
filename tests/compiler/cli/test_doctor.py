"""``qie doctor``."""

import json
import re
from pathlib import Path

import pytest

from qie.engines import gpus
from tests.support.command_line import Qie
from tests.support.libcuda import Libcuda, StandIn
from tests.support.repository import ROOT

L40S = StandIn(name="NVIDIA L40S", capability="8.9", bytes=47_576_711_168, pci="0000:65:00.0")
GB10 = StandIn(name="NVIDIA GB10", capability="12.1", integrated=1, pci="000F:01:00.0")


def test_doctor(qie: Qie, named_bundle: str, qie_home: Path) -> None:
    text = qie("doctor").stdout
    assert re.search(r"^run engines of onnxruntime +yes", text, re.MULTILINE)
    assert re.search(rf"^{named_bundle} +yes$", text, re.MULTILINE)
    report = json.loads(qie("doctor", "--json").stdout)
    assert set(report) >= {"qie", "python", "machine", "home", "free_bytes", "capabilities", "bundles"}
    (cpu,) = [c for c in report["capabilities"] if c["name"] == "run engines of onnxruntime"]
    needed = {"ready": True, "missing": [], "fix": None, "trial": None}
    assert cpu == {"name": cpu["name"], "requirements": cpu["requirements"], **needed}
    assert report["home"] == str(qie_home)
    assert report["bundles"] == [{"name": named_bundle, "reason": None}]


def test_what_no_gpu_has_run_is_told(qie: Qie) -> None:
    """With the command that tries it, which the Makefile has."""
    trials = {c["name"]: c["trial"] for c in json.loads(qie("doctor", "--json").stdout)["capabilities"]}
    assert trials["run engines of tensorrt-llm"] == "make test-gpu-trtllm"
    assert trials["run engines of tensorrt"] == trials["run engines of tensorrt-rtx"] == "make test-gpu"
    targets = (ROOT / "Makefile").read_text()
    for trial in filter(None, trials.values()):
        assert f"\n{trial.removeprefix('make ')}: " in targets
        assert f"not run on a GPU yet: `{trial}` in a clone of qie tries it there" in qie("doctor").stdout


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "libcuda", lambda: Libcuda([L40S, GB10]))


@pytest.mark.usefixtures("driver")
def test_gpus_have_the_numbers_by_which_they_are_chosen(qie: Qie) -> None:
    text = qie("doctor").stdout
    assert re.search(
        r"^GPU 0 +NVIDIA L40S, compute capability 8\.9, 44\.3 GiB, PCI 0000:65:00\.0\n"
        r"GPU 1 +NVIDIA GB10, compute capability 12\.1, memory shared with the CPU, PCI 000F:01:00\.0\n"
        r"driver +\(CUDA 12\.8\)$",
        text,
        re.MULTILINE,
    ), text
    machine = json.loads(qie("doctor", "--json").stdout)["machine"]
    assert [(gpu["index"], gpu["name"]) for gpu in machine["gpus"]] == [(0, L40S.name), (1, GB10.name)]
    assert (machine["cuda"], machine["driver"], machine["no_gpu"]) == ("12.8", None, None)


@pytest.mark.usefixtures("driver")
def test_why_there_is_no_gpu(qie: Qie, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    text = re.sub(r"\s+", " ", qie("doctor").stdout)
    why = "CUDA finds no GPU here (CUDA_ERROR_NO_DEVICE from cuInit), and CUDA_VISIBLE_DEVICES is '7'"
    assert f"GPU none: {why} " in text
    machine = json.loads(qie("doctor", "--json").stdout)["machine"]
    assert machine["no_gpu"] == f"{why}; unset CUDA_VISIBLE_DEVICES, or set it to GPUs of this machine"
