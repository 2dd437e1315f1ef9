"""Run the self-test: build the pocket model for the GPU at hand with every backend, and check what it does."""

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import qie
from qie.compiler.backends import BUILDERS
from qie.compiler.recipe.load import load_recipe
from qie.compiler.selftest.case import Case, build_pocket, recipe_text
from qie.compiler.selftest.checks import CHECKS, Checked
from qie.compiler.selftest.report import Check, Failed, Report, Result
from qie.engines.backends import BACKENDS, available, cuda_fix, cuda_lacking, package_versions
from qie.engines.bundle.bundle import Bundle
from qie.engines.errors import BackendMissingError, EngineMismatchError, QieError
from qie.engines.gpus import Gpu
from qie.engines.machine import Machine, absent_gpu, this_machine
from qie.engines.progress import Progress, no_progress
from qie.engines.sessions.choose import choose_engines
from qie.engines.sessions.tensorrt.messages import messages_of

__all__ = ["TESTED", "run"]

TESTED = ("tensorrt-rtx", "tensorrt")
"""Backends whose engines share a GPU as the self-test checks it."""


def run(
    folder: Path,
    *,
    device: int | None = None,
    backends: Sequence[str] = TESTED,
    checks: Mapping[str, Checked] = CHECKS,
    progress: Progress = no_progress,
) -> Report:
    """Test one GPU.

    A backend that is not installed, or that does not serve the GPU, is skipped with its reason; a check that does not
    find what it should fails, and the others run all the same.

    Args:
        folder: empty folder for the bundles.
        device: CUDA index of the GPU; None is the first.
        backends: names out of ``TESTED``.
        checks: what is checked.
        progress: called with (backend, checks done, checks in all).

    Raises:
        EngineMismatchError: there is no such GPU.
        QieError: the pocket model cannot be built for the CPU.
    """
    machine = this_machine()
    gpu = _gpu(machine, device)
    on_cpu = build_pocket("cpu", folder / "cpu")
    found: list[Check] = []
    for backend in backends:
        start = time.perf_counter()
        try:
            on_gpu = _build(backend, gpu, folder, memory_gib=gpu.memory_gib or machine.memory_gib)
        except BackendMissingError as problem:
            found.append(_check(backend, "build", "skipped", str(problem), start))
        except QieError as problem:
            found.append(_check(backend, "build", "failed", str(problem), start))
        else:
            engines = len(on_gpu.manifest.engines)
            found.append(_check(backend, "build", "passed", f"{engines} engines of pocket in bfloat16", start))
            case = Case(backend=backend, on_gpu=on_gpu, on_cpu=on_cpu, device=gpu.index)
            found += _run_checks(case, checks, progress)
    return Report(
        qie=qie.__version__,
        machine=machine,
        gpu=gpu.name,
        packages=package_versions(),
        checks=tuple(found),
        warnings=tuple(dict.fromkeys(_warnings(found))),
    )


def _gpu(machine: Machine, device: int | None) -> Gpu:
    absent = absent_gpu(machine, device)
    if absent is not None:
        raise EngineMismatchError(absent, option=None if device is None else "device")
    return next(gpu for gpu in machine.gpus if device in (None, gpu.index))


def _build(backend: str, gpu: Gpu, folder: Path, *, memory_gib: float) -> Bundle:
    recipe = folder / f"{backend}.toml"
    text = recipe_text(backend, gpu=gpu.name, capability=gpu.compute_capability, memory_gib=memory_gib)
    recipe.write_text(text, encoding="utf-8")
    reason = BUILDERS[backend].unavailable(load_recipe(str(recipe)), gpu.index)
    if reason is None and not available(backend):
        reason = f"{backend} cannot execute here; run `{BACKENDS[backend].install}`"
    if reason is not None:
        raise BackendMissingError(reason)
    served = this_machine().cuda
    lacking = cuda_lacking(backend, served)
    if lacking is not None and served is not None:
        raise EngineMismatchError(
            f"the packages of {backend} need a driver for CUDA {lacking}, and this one serves CUDA {served}; "
            f"{cuda_fix(backend, served)}"
        )
    bundle = build_pocket(recipe, folder / backend, device=gpu.index)
    choose_engines(bundle, gpu.index)
    return bundle


def _run_checks(case: Case, checks: Mapping[str, Checked], progress: Progress) -> Iterator[Check]:
    for number, (name, check) in enumerate(checks.items()):
        progress(case.backend, number, len(checks))
        start = time.perf_counter()
        try:
            found = check(case)
        except Failed as problem:
            yield _check(case.backend, name, "failed", str(problem), start)
        except Exception as problem:  # of whatever kind: the person with the GPU reports it, and the rest runs
            yield _check(case.backend, name, "failed", f"{type(problem).__name__}: {problem}", start)
        else:
            yield _check(case.backend, name, "passed", found, start)
    progress(case.backend, len(checks), len(checks))


def _check(backend: str, name: str, result: Result, found: str, start: float) -> Check:
    seconds = round(time.perf_counter() - start, 3)
    return Check(backend=backend, name=name, result=result, found=found, seconds=seconds)


def _warnings(checks: Sequence[Check]) -> Iterator[str]:
    """What TensorRT warned of while the checks ran."""
    for backend in dict.fromkeys(check.backend for check in checks if check.result != "skipped"):
        yield from messages_of(import_module(BACKENDS[backend].modules[0])).warnings
