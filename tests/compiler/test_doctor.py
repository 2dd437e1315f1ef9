"""The doctor: capabilities with what they require, what is missing with its fix, bundles with why they do not run."""

import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import qie
from qie.compiler import doctor as module
from qie.compiler.doctor import Capability, Report, examine
from qie.engines import backends
from qie.engines.gpus import Gpu
from qie.engines.machine import this_machine
from tests.support.damage import change_manifest

RUN, BUILD, COMPARE = "run engines of onnxruntime", "build bundles for a CPU", "compare with diffusers"


def capabilities(report: Report) -> dict[str, Capability]:
    return {capability.name: capability for capability in report.capabilities}


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let packages look as if they were not installed, and all others as if they were."""
    monkeypatch.setattr(module, "installed", lambda name: name not in packages)


def test_this_machine(qie_home: Path) -> None:
    report = examine()
    assert report.qie == qie.__version__
    assert report.python == platform.python_version()
    assert report.machine == this_machine()
    assert report.home == str(qie_home)
    assert report.free_bytes == pytest.approx(shutil.disk_usage(qie_home).free, abs=1e9)
    assert report.bundles == ()
    assert {RUN, BUILD, COMPARE} <= set(capabilities(report))
    assert capabilities(report)[RUN].ready
    assert capabilities(report)[BUILD].requirements[0].startswith("onnx ")
    assert capabilities(report)[BUILD].fix is None


def test_what_is_missing_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "ml_dtypes", "torch")
    found = capabilities(examine())
    assert found[RUN].ready
    assert not found[BUILD].ready
    assert found[BUILD].missing == ("ml_dtypes",)
    assert found[BUILD].fix == "pip install 'qie[compile]'"
    assert [words.split()[0] for words in found[BUILD].requirements][:2] == ["onnx", "onnxscript"]
    assert (found[COMPARE].missing, found[COMPARE].fix) == (("torch",), "pip install 'qie[reference]'")


def test_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime")
    assert capabilities(examine())[RUN].fix == "pip install qie"


def test_a_module_of_another_distribution_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu brings the module onnxruntime, and no distribution of that name."""
    monkeypatch.setattr(module, "version_of", lambda package: None)
    run = capabilities(examine())[RUN]
    assert run.ready
    assert run.requirements == ("onnxruntime",)


REPLACED = "onnxruntime-gpu, whose files those of the package for CPUs have replaced"


@pytest.mark.parametrize(
    ("built", "missing", "fix"),
    [
        (
            "13.0",
            "a driver for CUDA 13, where this one serves CUDA 12.8",
            "update the driver, or install an onnxruntime-gpu that is built for CUDA 12",
        ),
        ("12.8", None, None),
        (None, REPLACED, backends.BACKENDS["onnxruntime"].gpu_install),
    ],
)
def test_onnxruntime_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, built: str | None, missing: str | None, fix: str | None
) -> None:
    gpu = Gpu(index=0, name="NVIDIA L40S", compute_capability="8.9", memory_gib=45.0)
    monkeypatch.setattr(module, "this_machine", lambda: replace(machine, gpus=(gpu,), cuda="12.8"))
    monkeypatch.setattr(module, "version_of", {"onnxruntime-gpu": "1.31.1"}.get)
    for place in (module, backends):
        monkeypatch.setattr(place, "built_for_cuda", lambda: built)
    machine = this_machine()
    found = capabilities(examine())["run engines of onnxruntime on a GPU"]
    assert found.requirements == ("onnxruntime-gpu 1.31.1",)
    assert (found.ready, found.fix) == (missing is None, fix)
    assert found.missing == (() if missing is None else (missing,))


def test_bundles(bundle: Path, qie_home: Path) -> None:
    for name in ("good", "foreign", "damaged"):
        shutil.copytree(bundle, qie_home / "bundles" / name)
    foreign = qie_home / "bundles" / "foreign"
    engines = json.loads((foreign / "manifest.json").read_text())["engines"]
    change_manifest(foreign, engines=[e | {"backend": "abacus", "compute_capability": "8.0"} for e in engines])
    (qie_home / "bundles" / "damaged" / "vision.weights").unlink()
    reasons = {report.name: report.reason for report in examine().bundles}
    assert reasons["good"] is None
    assert "vision is built for abacus/8.0, which this qie cannot execute" in str(reasons["foreign"])
    assert "lacks vision.weights; build the bundle again with `qie build`" in str(reasons["damaged"])


def test_a_home_that_does_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QIE_HOME", str(tmp_path / "a" / "b"))
    report = examine()
    assert report.free_bytes > 0
    assert not (tmp_path / "a").exists()
