"""Which engine runs on which machine, and the sentence that says why not: GPU, capability, backend, driver, version."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from qie.compiler import doctor
from qie.engines import backends
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, GraphRecord
from qie.engines.bundle.sealed import write_manifest
from qie.engines.editing.editor import Editor
from qie.engines.errors import BackendMissingError, BundleError, EngineMismatchError
from qie.engines.gpus import NO_GPU, Gpu
from qie.engines.machine import Machine
from qie.engines.sessions import choose as module
from qie.engines.sessions.choose import choose_engines, newest_runnable, refusal
from tests.support.damage import change_manifest

L40S = Gpu(index=0, name="NVIDIA L40S", compute_capability="8.9", memory_gib=44.3)
A100 = Gpu(index=1, name="NVIDIA A100 80GB", compute_capability="8.0", memory_gib=79.3)
INSTALLED = {"cuda-bindings": "12.9.1", "tensorrt-rtx-cu12": "1.7.1.116", "tensorrt-cu12": "10.13.3.9"}
VERSIONS = {"tensorrt-rtx": "1.7.1.116", "tensorrt": "10.13.3.9"}


def machine(*gpus: Gpu, cuda: str | None = "12.8") -> Machine:
    return Machine(
        system="test", cpu="test", cores=1, memory_gib=1.0, gpus=gpus, cuda=cuda, driver="570.86.15", no_gpu=NO_GPU
    )


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All backends, for CUDA 12, on a machine with an L40S; a test takes away what it is about."""
    monkeypatch.setattr(backends, "installed", lambda name: True)
    monkeypatch.setattr(backends, "version_of", INSTALLED.get)
    monkeypatch.setattr(module, "version", VERSIONS.__getitem__)
    monkeypatch.setattr(module, "serves_gpu", lambda: True)
    monkeypatch.setattr(module, "this_machine", lambda: machine(L40S))


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(str(bundle))


def engine(opened: Bundle, backend: str = "tensorrt-rtx", capability: str = "8.9", **changes: Any) -> EngineRecord:
    version = VERSIONS.get(backend, "1.23")
    record = replace(opened.manifest.engines[0], backend=backend, compute_capability=capability)
    return replace(record, **{"backend_version": version} | changes)


def with_engines(opened: Bundle, *kinds: dict[str, Any]) -> Bundle:
    """The bundle with, for every component, an engine of every kind."""
    engines = tuple(replace(e, **kind) for e in opened.manifest.engines for kind in kinds)
    return replace(opened, manifest=replace(opened.manifest, engines=engines))


RTX = {"backend": "tensorrt-rtx", "compute_capability": "8.9", "backend_version": VERSIONS["tensorrt-rtx"]}
TENSORRT = {"backend": "tensorrt", "compute_capability": "8.0", "backend_version": VERSIONS["tensorrt"]}


@pytest.mark.parametrize(
    ("backend", "capability"),
    [("tensorrt-rtx", "8.9"), ("tensorrt", "8.9"), ("onnxruntime", "8.9"), ("onnxruntime", "cpu")],
)
def test_what_fits(opened: Bundle, backend: str, capability: str) -> None:
    assert refusal(engine(opened, backend, capability), machine(L40S)) is None
    assert refusal(engine(opened, backend, capability), machine(A100, L40S)) is None


def test_the_processor_needs_no_look_at_the_machine(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: pytest.fail("the machine was looked at"))
    assert len(choose_engines(opened)) == len(COMPONENTS)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt", "onnxruntime"])
def test_no_gpu(opened: Bundle, backend: str) -> None:
    assert refusal(engine(opened, backend), machine()) == (
        f"vision is built for {backend}/8.9, and CUDA finds no GPU here; use a machine with an NVIDIA GPU, or build "
        "for this machine with the recipe cpu"
    )


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt", "onnxruntime"])
def test_another_gpu(opened: Bundle, backend: str) -> None:
    assert refusal(engine(opened, backend), machine(A100, A100)) == (
        f"vision is built for {backend}/8.9, and this machine has NVIDIA A100 80GB (8.0); build for that GPU with "
        "a recipe of `qie recipes`"
    )


@pytest.mark.parametrize(
    ("backend", "lacks", "install"),
    [
        ("tensorrt-rtx", "tensorrt_rtx", "pip install 'qie[rtx]'"),
        ("tensorrt-rtx", "cuda.bindings", "pip install 'qie[rtx]'"),
        ("tensorrt", "tensorrt", "pip install 'qie[tensorrt]'"),
        ("onnxruntime", "onnxruntime", "pip install qie"),
    ],
)
def test_a_backend_that_is_not_installed(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str, lacks: str, install: str
) -> None:
    monkeypatch.setattr(backends, "installed", lambda name: name != lacks)
    expected = f"vision is built for {backend}/8.9, which is not installed here; run `{install}`"
    assert refusal(engine(opened, backend), machine(L40S)) == expected
    with pytest.raises(BackendMissingError, match=re.escape(expected)):
        choose_engines(with_engines(opened, RTX | {"backend": backend}))


def test_an_onnxruntime_without_a_gpu(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "serves_gpu", lambda: False)
    assert refusal(engine(opened, "onnxruntime"), machine(L40S)) == (
        "vision is built for onnxruntime/8.9, and the onnxruntime that is installed here uses only the CPU; run "
        "`pip install 'qie[cuda]' && pip uninstall --yes onnxruntime "
        "&& pip install --force-reinstall --no-deps onnxruntime-gpu`"
    )
    assert refusal(engine(opened, "onnxruntime", "cpu"), machine(L40S)) is None


def test_a_driver_that_is_too_old_for_what_is_installed(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INSTALLED, "cuda-bindings", "13.4.4")
    assert refusal(engine(opened), machine(L40S)) == (
        "vision is built for tensorrt-rtx/8.9, whose packages here need a driver for CUDA 13, and driver 570.86.15 "
        "serves CUDA 12.8; update the driver, or run `pip install 'cuda-python<13' tensorrt-rtx-cu12`"
    )
    assert refusal(engine(opened), machine(L40S, cuda="13.1")) is None
    assert refusal(engine(opened), machine(L40S, cuda=None)) is None  # the session finds out
    assert refusal(engine(opened, "onnxruntime"), machine(L40S)) is None


def test_a_driver_that_is_too_old_for_onnxruntime(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "built_for_cuda", lambda: "13.0")
    assert refusal(engine(opened, "onnxruntime"), machine(L40S)) == (
        "vision is built for onnxruntime/8.9, whose packages here need a driver for CUDA 13, and driver 570.86.15 "
        "serves CUDA 12.8; update the driver, or install an onnxruntime-gpu that is built for CUDA 12"
    )
    assert refusal(engine(opened, "onnxruntime"), machine(L40S, cuda="13.0")) is None
    assert refusal(engine(opened, "onnxruntime", "cpu"), machine(L40S)) is None
    assert refusal(engine(opened), machine(L40S)) is None  # TensorRT has packages of its own


def test_a_driver_for_which_there_are_no_packages(opened: Bundle) -> None:
    message = refusal(engine(opened, "tensorrt"), machine(L40S, cuda="11.4"))
    assert message is not None
    assert message.endswith("need a driver for CUDA 12, and driver 570.86.15 serves CUDA 11.4; update the driver")


def test_a_package_for_a_later_cuda(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INSTALLED, "tensorrt-cu13", "10.13.3.9")
    assert "need a driver for CUDA 13" in str(refusal(engine(opened, "tensorrt"), machine(L40S)))


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_an_engine_of_another_version(opened: Bundle, backend: str) -> None:
    package = f"{backend}-cu12"
    assert refusal(engine(opened, backend, backend_version="1.6.0.9"), machine(L40S)) == (
        f"vision is built for {backend}/8.9, version 1.6.0.9, but version {VERSIONS[backend]} is installed; "
        f"build the bundle again with `qie build`, or run `pip install {package}==1.6.0.9`"
    )


def test_onnxruntime_runs_graphs_of_any_version(opened: Bundle) -> None:
    for capability in ("cpu", "8.9"):
        assert refusal(engine(opened, "onnxruntime", capability, backend_version="0.1"), machine(L40S)) is None


def test_a_backend_that_does_not_load(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(backends, "import_module", broken)
    monkeypatch.setattr(module, "version", backends.version)
    message = refusal(engine(opened), machine(L40S))
    assert message == (
        "tensorrt-rtx is installed but does not load (libnvinfer.so.10: cannot open shared object file); install it "
        "again with `pip install 'qie[rtx]'`"
    )


def test_a_backend_that_nobody_knows(opened: Bundle) -> None:
    assert refusal(engine(opened, "abacus"), machine(L40S)) == (
        "vision is built for abacus/8.9, which this qie cannot execute; build for this machine with the recipe cpu"
    )


# Chosen


def test_the_first_that_fits(opened: Bundle) -> None:
    several = with_engines(opened, TENSORRT, RTX, {})
    assert {e.backend for (e,) in choose_engines(several).values()} == {"tensorrt-rtx"}


@pytest.mark.parametrize(("gpu", "backend"), [(A100, "tensorrt"), (L40S, "tensorrt-rtx"), (None, "onnxruntime")])
def test_a_bundle_for_several_machines(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, backend: str
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: machine(*filter(None, [gpu])))
    chosen = choose_engines(with_engines(opened, RTX, TENSORRT, {}))
    assert {e.backend for (e,) in chosen.values()} == {backend}
    assert list(chosen) == list(COMPONENTS)


@pytest.mark.parametrize(
    ("device", "backend"), [(None, "tensorrt-rtx"), (0, "tensorrt-rtx"), (1, "tensorrt"), (2, "tensorrt-rtx")]
)
def test_a_gpu_that_was_chosen(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, device: int | None, backend: str
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: machine(L40S, A100, replace(L40S, index=2)))
    chosen = choose_engines(with_engines(opened, RTX, TENSORRT, {}), device)
    assert {e.backend for (e,) in chosen.values()} == {backend}


@pytest.mark.parametrize(
    ("kind", "device", "problem"),
    [
        (RTX, 1, "vision is built for tensorrt-rtx/8.9, and GPU 1 is NVIDIA A100 80GB (8.0); choose GPU 0"),
        (
            RTX,
            3,
            "vision is built for tensorrt-rtx/8.9, and there is no GPU 3, where GPU 0 is NVIDIA L40S, GPU 1 is NVIDIA "
            "A100 80GB; choose one of these",
        ),
        (
            {},
            0,
            "the engines of BUNDLE that run here are for the CPU, and GPU 0 was chosen; choose none, or build for that "
            "GPU with a recipe of `qie recipes`",
        ),
    ],
)
def test_a_gpu_that_runs_none_of_the_engines(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], device: int, problem: str
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: machine(L40S, A100))
    with pytest.raises(EngineMismatchError) as refused:
        choose_engines(with_engines(opened, kind), device)
    assert str(refused.value) == problem.replace("BUNDLE", str(opened.path))
    assert refused.value.option == "device"


def test_all_engines_are_for_one_gpu(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision has an engine for each of two GPUs, the other components for one of them, or some for either."""
    monkeypatch.setattr(module, "this_machine", lambda: machine(L40S, A100))
    vision, *others = opened.manifest.engines
    engines = [replace(vision, **RTX), replace(vision, **TENSORRT), *(replace(e, **TENSORRT) for e in others)]
    several = replace(opened, manifest=replace(opened.manifest, engines=tuple(engines)))
    assert {e.compute_capability for (e,) in choose_engines(several).values()} == {"8.0"}
    apart = replace(opened, manifest=replace(opened.manifest, engines=(engines[0], *engines[2:])))
    with pytest.raises(EngineMismatchError, match=r"compute capability 8\.9 and 8\.0, and an edit uses one GPU; build"):
        choose_engines(apart)


def test_every_reason_is_given(opened: Bundle) -> None:
    old = RTX | {"backend_version": "1.0"}
    with pytest.raises(EngineMismatchError) as problem:
        choose_engines(with_engines(opened, old, TENSORRT))
    both = r"vision .*, version 1\.0.*, and vision is built for tensorrt/8\.0, and this [^;]*; build .* or build [^;]*"
    assert re.fullmatch(both, str(problem.value))


def test_the_machine_is_looked_at_once(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(module, "this_machine", lambda: looks.append(1) or machine(L40S))
    choose_engines(with_engines(opened, TENSORRT, RTX))
    assert len(looks) == 1


def test_an_unfinished_bundle(opened: Bundle) -> None:
    record = opened.manifest.engines[-1]
    kept = {f: getattr(record, f) for f in ("component", "key", "path", "files", "inputs", "outputs", "parameters")}
    graph = GraphRecord(**kept, backend="tensorrt", precision="bfloat16", profiles=())
    manifest = replace(opened.manifest, engines=opened.manifest.engines[:-1], graphs=(graph,))
    with pytest.raises(BundleError, match=f"no engine for {record.component} yet; run `qie build --finish "):
        choose_engines(replace(opened, manifest=manifest))


# Shown


Qie = Callable[..., CompletedProcess[str]]


@pytest.fixture
def named(opened: Bundle, qie_home: Path) -> str:
    """A bundle with a name whose engines are for another GPU, files and all."""
    folder = qie_home / "bundles" / "foreign"
    folder.mkdir(parents=True)
    for record in opened.manifest.files():
        (folder / record.path).parent.mkdir(exist_ok=True)
        (folder / record.path).hardlink_to(opened.path / record.path)
    write_manifest(with_engines(opened, TENSORRT).manifest, folder)
    return folder.name


def test_inspect_shows_the_reason_of_each_engine(qie: Qie, named: str) -> None:
    done = qie("inspect", named)
    for component in COMPONENTS:
        assert f"{component} is built for tensorrt/8.0, and this machine has NVIDIA L40S (8.9)" in done.stdout
    rows = json.loads(qie("inspect", named, "--json").stdout)["engines"]
    assert [row["runs_here"] for row in rows] == [False] * len(COMPONENTS)
    assert all("a recipe of `qie recipes`" in row["reason"] for row in rows)


def test_run_is_refused_before_anything_is_loaded(
    qie: Qie, named: str, workplace: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qie.engines.sessions.load.load", lambda *_: pytest.fail("an engine was loaded"))
    message = refusal(qie("run", "photo.png", "make it red", "--bundle", named))
    assert message.startswith(
        "vision is built for tensorrt/8.0, and this machine has NVIDIA L40S (8.9); build for that GPU"
    )


def test_doctor_shows_bundles_gpu_and_driver(qie: Qie, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda: machine(L40S))
    text = qie("doctor").stdout
    assert re.search(r"^GPU 0 +NVIDIA L40S, compute capability 8\.9, 44\.3 GiB$", text, re.MULTILINE)
    assert re.search(r"^driver +570\.86\.15 \(CUDA 12\.8\)$", text, re.MULTILINE)
    assert re.search(rf"^{named} +no\n +vision is built for tensorrt/8.0, and this machine has", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("of", "gpus", "cuda", "missing", "fix"),
    [
        ("tensorrt-rtx", (), "12.8", ("an NVIDIA GPU",), "use a machine with an NVIDIA GPU"),
        (
            "tensorrt-rtx",
            (L40S,),
            "11.8",
            ("a driver for CUDA 12, where this one serves CUDA 11.8",),
            "update the driver",
        ),
        ("tensorrt-rtx", (L40S,), "12.8", (), None),
        ("tensorrt", (L40S,), "12.8", (), None),
        ("onnxruntime on a GPU", (L40S,), "12.8", (), None),
        ("onnxruntime", (), None, (), None),
    ],
)
def test_doctor_on_backends(
    monkeypatch: pytest.MonkeyPatch,
    of: str,
    gpus: tuple[Gpu, ...],
    cuda: str | None,
    missing: tuple[str, ...],
    fix: str | None,
) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda: machine(*gpus, cuda=cuda))
    monkeypatch.setattr(doctor, "installed", lambda name: True)
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    monkeypatch.setattr(doctor, "built_for_cuda", lambda: "12.8")
    (capability,) = [c for c in doctor.examine().capabilities if c.name == f"run engines of {of}"]
    assert (capability.missing, capability.fix, capability.ready) == (missing, fix, not missing)


def test_the_newest_that_runs_here(opened: Bundle, qie_home: Path) -> None:
    folder = qie_home / "bundles"
    with pytest.raises(BundleError, match="there is no bundle in"):
        newest_runnable()
    for age, name in enumerate(("runs", "foreign", "damaged")):
        shutil.copytree(opened.path, folder / name)
        os.utime(folder / name / "manifest.json", (age, age))
    engines = json.loads((folder / "foreign" / "manifest.json").read_text())["engines"]
    change_manifest(
        folder / "foreign", engines=[e | {"backend": "abacus", "compute_capability": "8.0"} for e in engines]
    )
    os.utime(folder / "foreign" / "manifest.json", (1, 1))
    (folder / "damaged" / "vision.weights").unlink()
    assert newest_runnable().name == "runs"
    assert Editor().bundle.name == "runs"
    shutil.rmtree(folder / "runs")
    with pytest.raises(BundleError, match="lacks vision.weights"):  # why the newest does not
        newest_runnable()
    shutil.rmtree(folder / "damaged")
    with pytest.raises(EngineMismatchError, match=r"abacus/8.0, which this qie cannot execute"):
        newest_runnable()
