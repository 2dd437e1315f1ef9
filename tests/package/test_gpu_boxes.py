"""What ``make test-gpu`` installs and runs on machines with GPUs, on made-up ones."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from qie.compiler.backends.tensorrt import builder
from qie.compiler.recipe.load import parse_recipe
from qie.engines import backends, gpus
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.machine import Machine, this_machine
from qie.engines.sessions import choose
from tests.support import fake_gpu, gpu_bundles
from tests.support.libcuda import Libcuda, StandIn, compile_library
from tests.support.repository import ROOT
from tests.support.small_graphs import needs_rtx


def script() -> ModuleType:
    """tests/gpu/requirements.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "tests" / "gpu" / "requirements.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = script()


class Box(NamedTuple):
    """A machine with one GPU: what the driver says, what is installed, and the reason why a backend is skipped."""

    name: str
    capability: str
    driver: str
    cuda: str
    installs: list[str]
    skipped: dict[str, str]


NOT_INSTALLED = {"tensorrt": "tensorrt is not installed; run `pip install 'qie[tensorrt]'`"}
NO_SM90 = {
    "tensorrt-rtx": "tensorrt-rtx 1.7.1 does not compile for compute capability 9.0; set other backends in the recipe"
}
FOR_CPU = {
    "onnxruntime": "the onnxruntime that is installed here uses only the CPU; run "
    f"`{backends.BACKENDS['onnxruntime'].gpu_install}`"
}
RTX, TENSORRT = "--editable .[compile,rtx]", "--editable .[compile,tensorrt]"
CUDA12, CUDA13 = "cuda-python<13", "cuda-python>=13"

BOXES = [
    Box("L40S", "8.9", "570.86.15", "12.8", [RTX, CUDA12, "pytest"], NOT_INSTALLED | FOR_CPU),
    Box("L40S", "8.9", "580.95.05", "13.0", [RTX, CUDA13, "pytest"], NOT_INSTALLED | FOR_CPU),
    Box("H100", "9.0", "580.95.05", "13.0", [TENSORRT, CUDA13, "pytest"], NO_SM90 | FOR_CPU),
    Box("A100", "8.0", "550.54.15", "12.4", [TENSORRT, CUDA12, "pytest"], FOR_CPU),
    Box("RTX 4090", "8.9", "550.54.15", "12.4", [RTX, CUDA12, "pytest"], NOT_INSTALLED | FOR_CPU),
]
NAMES = [f"{box.name}, driver {box.driver.partition('.')[0]}" for box in BOXES]


def driver(monkeypatch: pytest.MonkeyPatch, cuda: str, *capabilities: str, init: int = 0) -> gpus.Driver:
    """What the driver of a made-up machine says."""
    major, minor = map(int, cuda.split("."))
    stand_ins = [StandIn(name="GPU", capability=capability) for capability in capabilities]
    library = Libcuda(stand_ins, cuda=1000 * major + 10 * minor, init=init)
    monkeypatch.setattr(gpus, "libcuda", lambda: library)
    return gpus.find_driver()


@pytest.mark.parametrize("box", BOXES, ids=NAMES)
def test_what_is_installed(monkeypatch: pytest.MonkeyPatch, box: Box) -> None:
    assert SCRIPT.requirements(driver(monkeypatch, box.cuda, box.capability)) == box.installs


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["--editable .[compile,rtx,tensorrt]", CUDA13, "pytest"]
    assert SCRIPT.requirements(driver(monkeypatch, "13.1", "9.0", "12.0")) == both


@pytest.mark.parametrize(
    ("cuda", "capabilities", "init", "reason"),
    [
        ("12.8", (), 0, "CUDA finds no GPU here (CUDA_ERROR_NO_DEVICE from cuInit); use a machine with an NVIDIA GPU"),
        ("12.8", ("8.9",), 803, "CUDA finds no GPU here (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH from cuInit), since"),
        ("11.4", ("8.6",), 0, "the NVIDIA driver serves CUDA 11.4, expected 12 or later; update the driver"),
    ],
    ids=["no GPU", "broken driver", "old driver"],
)
def test_where_nothing_can_run(
    monkeypatch: pytest.MonkeyPatch, cuda: str, capabilities: tuple[str, ...], init: int, reason: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        SCRIPT.requirements(driver(monkeypatch, cuda, *capabilities, init=init))


@pytest.mark.parametrize("capability", ["8.9", None])
def test_the_script(tmp_path: Path, capability: str | None) -> None:
    """It asks the library of the driver, and needs no package."""
    library = compile_library(tmp_path)
    if library is None:
        pytest.skip("no C compiler is installed")
    row = StandIn(name="GPU", capability=capability).row if capability else ""
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "STANDIN_GPUS": row, "STANDIN_CUDA": "12040"}
    command = [sys.executable, "-S", str(ROOT / "tests" / "gpu" / "requirements.py")]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    if capability:
        assert done.stdout.splitlines() == [RTX, CUDA12, "pytest"], done.stderr
    else:
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("the tests on a GPU cannot run here: CUDA finds no GPU here (CUDA_ERROR_NO_DEVI")


def test_no_constraint_decides_on_cuda() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (install,) = re.findall(r"^\$\(VENV\)/gpu\.stamp:.*\n\t(.*)$", makefile, re.MULTILINE)
    assert install == "$(PIP) install $(CONSTRAINTS) --requirement $<"
    assert "CONSTRAINTS := --constraint .ci/constraints.txt\n" in makefile
    names = {Requirement(line).name for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()}
    assert not {name for name in names if name.startswith("cuda")}


# What the tests do there


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Box], None]:
    """Put this process on a machine with a GPU and the packages that are installed there."""

    def on(box: Box) -> None:
        gpu = gpus.Gpu(index=0, name=box.name, compute_capability=box.capability, memory_gib=40.0)
        machine: Machine = replace(this_machine(), gpus=(gpu,), cuda=box.cuda, driver=box.driver, no_gpu=None)
        for module in (gpu_bundles, choose, builder):
            monkeypatch.setattr(module, "this_machine", lambda: machine)
        bindings = "12.9.4" if CUDA12 in box.installs else "13.4.4"
        versions = {"cuda-bindings": bindings, "tensorrt-rtx-cu12": "1.7.1"}
        modules = {"onnxruntime", "cuda.bindings", "tensorrt_rtx"}
        if "tensorrt" in box.installs[0]:
            versions["tensorrt-cu12"] = "1.7.1"
            modules.add("tensorrt")
        monkeypatch.setattr(backends, "version_of", versions.get)
        monkeypatch.setattr(backends, "installed", modules.__contains__)
        monkeypatch.setattr(choose, "version", lambda backend: "1.7.1")
        monkeypatch.setattr(builder, "find_spec", lambda name: object() if name in modules else None)

    return on


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt", "onnxruntime"])
@pytest.mark.parametrize("box", BOXES, ids=NAMES)
def test_a_backend_builds_or_is_skipped_with_its_reason(
    box: Box,
    backend: str,
    install: Callable[[Box], None],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
) -> None:
    def build(checkpoint: Path, destination: Path, recipe: str) -> Bundle:
        parsed = parse_recipe(recipe, Path("mine.toml"))
        gpu = fake_gpu.Gpu(capability=str(parsed.compute_capability))
        return open_bundle(str(gpu.retarget(bundle, destination, parsed.backends[0])))

    install(box)
    supported = dict.fromkeys(("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"))
    trt = SimpleNamespace(__version__="1.7.1", ComputeCapability=SimpleNamespace(**supported))
    monkeypatch.setattr(builder, "import_module", lambda name: trt)
    monkeypatch.setattr(gpu_bundles, "build", build)
    if backend in box.skipped:
        with pytest.raises(pytest.skip.Exception) as skipped:
            gpu_bundles.build_for_gpu(checkpoint, tmp_path / "out", backend)
        assert str(skipped.value) == box.skipped[backend]
    else:
        built = gpu_bundles.build_for_gpu(checkpoint, tmp_path / "out", backend)
        assert {engine.backend for engine in built.manifest.engines} == {backend}
        assert {engine.compute_capability for engine in built.manifest.engines} == {box.capability}


def test_other_problems_are_failures(
    install: Callable[[Box], None], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    """A driver that is too old for what a person installed is one: nothing would run."""
    box = BOXES[0]._replace(installs=[RTX, CUDA13])
    install(box)
    monkeypatch.setattr(builder, "import_module", lambda name: pytest.importorskip("tensorrt_rtx"))
    fake = fake_gpu.Gpu(capability="8.9")
    monkeypatch.setattr(
        gpu_bundles, "build", lambda c, out, recipe: open_bundle(str(fake.retarget(bundle, out, "tensorrt-rtx")))
    )
    with pytest.raises(choose.EngineMismatchError, match="need a driver for CUDA 13, and driver 570"):
        gpu_bundles.build_for_gpu(checkpoint, tmp_path / "out", "tensorrt-rtx")


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("box", [BOXES[0], BOXES[3]], ids=[NAMES[0], NAMES[3]])
def test_tensorrt_for_rtx_builds_there(
    box: Box, install: Callable[[Box], None], monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    """The compiler itself, which needs no GPU."""
    install(box)
    monkeypatch.setattr(choose, "version", lambda backend: sys.modules["tensorrt_rtx"].__version__)
    built = gpu_bundles.build_for_gpu(checkpoint, tmp_path / "out", "tensorrt-rtx")
    assert {engine.compute_capability for engine in built.manifest.engines} == {box.capability}
