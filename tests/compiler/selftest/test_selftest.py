"""The self-test on a fake GPU: what it reports where all is well, where something is not, and where nothing can run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from qie.compiler.cli.app import app
from qie.compiler.selftest import run as module
from qie.compiler.selftest.case import Case, recipe_text
from qie.compiler.selftest.checks import CHECKS
from qie.compiler.selftest.report import Report
from qie.engines import backends
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.errors import EngineMismatchError
from qie.engines.sessions.tensorrt.contexts import Contexts
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.fake_gpu import Engine, Gpu

runner = CliRunner()
FEW = {name: CHECKS[name] for name in ("engine transformer", "edit", "moved arena")}


ONE = {"engine vision": CHECKS["engine vision"]}


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A fake GPU, whose engines are not compiled but described."""
    gpu = Gpu()
    gpu.install(monkeypatch, "tensorrt-rtx", "tensorrt")

    def build(backend: str, _: Any, folder: Path, *, memory_gib: float) -> Bundle:
        return open_bundle(str(gpu.retarget(folder / "cpu", folder / backend, backend)))

    monkeypatch.setattr(module, "_build", build)
    return gpu


def test_every_edit_of_a_check_runs_every_engine(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with Case(backend="onnxruntime", on_gpu=opened, on_cpu=opened).editor() as editor:
        assert not editor.encoder_cache.keeps


def results(report: Report) -> dict[str, str]:
    return {check.name: check.result for check in report.checks}


def test_every_check_passes(gpu: Gpu, tmp_path: Path, backend: str) -> None:
    checks = CHECKS if backend == "tensorrt-rtx" else FEW
    report = module.run(tmp_path, backends=[backend], checks=checks)
    assert results(report) == dict.fromkeys(["build", *checks], "passed"), [c.found for c in report.checks]
    found = {check.name: check.found for check in report.checks}
    assert "latents input float32 -1x-1x64" in found["engine transformer"]
    if checks is CHECKS:
        assert "image input uint8 1x-1x-1x3" in found["engine vae_encoder"]
    assert report.gpu == "Fake L40S"
    assert report.warnings == ()
    assert gpu.crashes == []
    assert gpu.blocks == {}


def test_an_engine_that_is_wrong_fails_alone(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Engine.get_tensor_profile_shape

    def narrow(self: Engine, name: str, profile_index: int) -> Any:
        shapes = inner(self, name, profile_index)
        return [(1, 1, 64)] * 3 if name == "latents" and self.component == "transformer" else shapes

    monkeypatch.setattr(Engine, "get_tensor_profile_shape", narrow)
    report = module.run(tmp_path, backends=["tensorrt-rtx"], checks=FEW | {"engine vision": CHECKS["engine vision"]})
    assert results(report) == {
        "build": "passed",
        "engine transformer": "failed",
        "edit": "failed",
        "moved arena": "failed",
        "engine vision": "passed",
    }
    assert "BundleError: " in report.checks[1].found or "RequestError: " in report.checks[1].found


def test_a_graph_that_writes_to_the_arena_of_before_is_found(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach(self: Contexts, bound: Any) -> Any:
        self._attach_arena(bound)
        return bound

    monkeypatch.setattr(Contexts, "_move", attach)
    checks = {"moved arena": CHECKS["moved arena"]}
    assert results(module.run(tmp_path, backends=["tensorrt-rtx"], checks=checks))["moved arena"] == "failed"


def test_what_tensorrt_warns_of_is_in_the_report(gpu: Gpu, tmp_path: Path) -> None:
    gpu.capturable = False
    checks = {"CUDA graphs": CHECKS["CUDA graphs"]}
    report = module.run(tmp_path, backends=["tensorrt-rtx"], checks=checks)
    assert report.warnings == ("The graph is not graph capturable. Falling back",)
    assert results(report)["CUDA graphs"] == "failed", "equal bytes would prove nothing"


def test_values_that_are_no_numbers_are_not_close(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = TensorRtSession.download

    def download(self: TensorRtSession, tensor: Any) -> Any:
        array = inner(self, tensor)
        return np.full_like(array, np.nan) if array.shape[-1] == 64 and downloads.append(1) is None else array

    downloads: list[int] = []
    checks = {"engine transformer": CHECKS["engine transformer"]}
    monkeypatch.setattr(TensorRtSession, "download", download)
    assert results(module.run(tmp_path, backends=["tensorrt-rtx"], checks=checks))["engine transformer"] == "failed"
    assert downloads


def test_the_command(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.run, "__kwdefaults__", module.run.__kwdefaults__ | {"checks": ONE})
    done = runner.invoke(app, ["selftest", "--backend", "tensorrt"])
    assert done.exit_code == 0, done.output
    assert "2 passed, 0 failed, 0 skipped" in done.output
    done = runner.invoke(app, ["selftest", "--backend", "tensorrt", "--json"])
    assert [check["result"] for check in json.loads(done.stdout)["checks"]] == ["passed"] * 2
    monkeypatch.setattr(Engine, "create_execution_context", lambda *_: None)
    done = runner.invoke(app, ["selftest", "--backend", "tensorrt"])
    assert done.exit_code == 1
    assert "1 passed, 1 failed, 0 skipped" in done.output


def test_a_machine_on_which_no_backend_serves_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(capability="9.0").install(monkeypatch)
    done = runner.invoke(app, ["selftest"])
    assert done.exit_code == 1
    assert "0 passed, 0 failed, 2 skipped" in done.output
    assert "does not compile for compute capability 9.0" in " ".join(done.output.split())
    assert "nothing was tested: no backend serves this GPU here" in done.output


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineMismatchError, match="libcuda.so.1 of NVIDIA's driver does not load here; install"):
        module.run(tmp_path)
    Gpu(count=2).install(monkeypatch)
    with pytest.raises(EngineMismatchError, match="there is no GPU 2, where GPU 0 is Fake L40S, GPU 1 is "):
        module.run(tmp_path, device=2)


def test_a_backend_that_cannot_be_tested() -> None:
    done = runner.invoke(app, ["selftest", "--backend", "onnxruntime"])
    assert done.exit_code != 0
    assert "cannot be tested; choose tensorrt-rtx or tensorrt" in str(done.exception)


def test_a_name_that_would_break_a_recipe() -> None:
    text = recipe_text("tensorrt", gpu='NVIDIA "X"\\\n™', capability="8.9", memory_gib=44.5)
    assert 'gpu = "NVIDIA X"' in text


def test_a_driver_that_is_too_old_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(cuda="12.8").install(monkeypatch)
    monkeypatch.setattr(backends, "installed", lambda module: True)
    monkeypatch.setattr(module, "build_pocket", lambda recipe, folder, **_: recipe)
    monkeypatch.setattr(backends, "version_of", {"cuda-bindings": "13.4.4"}.get)
    done = runner.invoke(app, ["selftest", "--backend", "tensorrt-rtx"])
    assert done.exit_code == 1, done.exception
    text = " ".join(done.output.split())
    assert "need a driver for CUDA 13, and this one serves CUDA 12.8; update the driver, or run `pip install" in text
    assert "nothing was tested" not in text
