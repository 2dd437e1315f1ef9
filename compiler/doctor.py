"""What this machine can build and run, and what to install for the rest."""

import platform
import shutil
from dataclasses import dataclass

import qie
from qie.engines.backends import BACKENDS, built_for_cuda, cuda_fix, cuda_lacking, installed
from qie.engines.bundle.bundle import bundles, open_bundle
from qie.engines.errors import QieError
from qie.engines.files import existing, qie_home
from qie.engines.machine import Machine, this_machine, version_of
from qie.engines.sessions.choose import choose_engines

__all__ = ["BundleReport", "Capability", "Report", "examine"]

RUN = "run engines of"
ON_GPU = "on a GPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """Something that qie can do where some packages, a GPU or a driver are present.

    Attributes:
        name: what qie can do.
        ready: whether nothing is missing.
        requirements: the packages that were found, with their versions.
        missing: packages, GPU or driver that were not found.
        fix: how to get what is missing; None where nothing is.
        trial: the command, in a clone of qie, that tries what has not run with the real packages and a GPU yet; None
            where it has.
    """

    name: str
    ready: bool
    requirements: tuple[str, ...]
    missing: tuple[str, ...]
    fix: str | None
    trial: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Need:
    """What a capability takes.

    Attributes:
        name: of the capability.
        packages: modules, or distributions where the name has a hyphen.
        fix: command that installs them.
        gpu_backend: the backend whose engines it runs on a GPU; None for another capability.
        gpu_package: the package that must have taken the place of the backend's own; None where there is no such one.
        trial: see ``Capability``.
    """

    name: str
    packages: tuple[str, ...]
    fix: str
    gpu_backend: str | None = None
    gpu_package: str | None = None
    trial: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleReport:
    """Whether a bundle runs on this machine.

    Attributes:
        name: of the bundle.
        reason: why it does not run; None where it does.
    """

    name: str
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What this machine is, can do and holds.

    Attributes:
        qie: version.
        python: version.
        machine: CPU, memory and GPUs.
        home: folder of bundles and caches.
        free_bytes: free on the disk of ``home``.
        capabilities: what qie can do here, and what is missing for the rest.
        bundles: those in ``home``.
    """

    qie: str
    python: str
    machine: Machine
    home: str
    free_bytes: int
    capabilities: tuple[Capability, ...]
    bundles: tuple[BundleReport, ...]


def examine() -> Report:
    """Examine the machine, the installed packages and the bundles; nothing heavy is imported."""
    home = qie_home()
    machine = this_machine()
    return Report(
        qie=qie.__version__,
        python=platform.python_version(),
        machine=machine,
        home=str(home),
        free_bytes=shutil.disk_usage(existing(home)).free,
        capabilities=tuple(_capability(need, machine) for need in _needs()),
        bundles=tuple(BundleReport(name=path.name, reason=_reason(str(path))) for path in bundles()),
    )


def _needs() -> list[_Need]:
    """The packages of every capability, and the command that installs them."""
    run = [
        _Need(
            name=f"{RUN} {name}",
            packages=backend.modules,
            fix=backend.install,
            gpu_backend=None if backend.on_cpu else name,
            trial=backend.trial,
        )
        for name, backend in BACKENDS.items()
    ]
    run_on_gpu = [
        _Need(
            name=f"{RUN} {name} {ON_GPU}",
            packages=(backend.gpu_package,),
            fix=backend.gpu_install,
            gpu_backend=name,
            gpu_package=backend.gpu_package,
            trial="make test-gpu",
        )
        for name, backend in BACKENDS.items()
        if backend.gpu_package is not None and backend.gpu_install is not None
    ]
    builders = [backend for backend in BACKENDS.values() if backend.compiles and not backend.builds_on_gpu]
    return [
        *run,
        *run_on_gpu,
        _Need(
            name="build bundles for a CPU",
            packages=("onnx", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"),
            fix="pip install 'qie[compile]'",
        ),
        _Need(name="build bundles for a GPU", packages=(builders[0].build_module,), fix=builders[0].build_install),
        _Need(
            name="compare with diffusers",
            packages=("torch", "diffusers", "transformers"),
            fix="pip install 'qie[reference]'",
        ),
    ]


def _capability(need: _Need, machine: Machine) -> Capability:
    present = [package for package in need.packages if _present(package)]
    missing, fix = tuple(package for package in need.packages if package not in present), need.fix
    if not missing and need.gpu_package is not None and built_for_cuda() is None:
        missing = (f"{need.gpu_package}, whose files those of the package for CPUs have replaced",)
    if not missing and need.gpu_backend is not None:
        missing, fix = _missing_of_gpu(need.gpu_backend, machine)
    return Capability(
        name=need.name,
        ready=not missing,
        requirements=tuple(f"{package} {_version(package)}".rstrip() for package in present),
        missing=missing,
        fix=fix if missing else None,
        trial=need.trial,
    )


def _missing_of_gpu(backend: str, machine: Machine) -> tuple[tuple[str, ...], str]:
    """What ``backend`` lacks of GPU and driver, and how to fix that."""
    if not machine.gpus:
        return ("an NVIDIA GPU",), str(machine.no_gpu).partition("; ")[2]
    lacking = cuda_lacking(backend, machine.cuda)
    if lacking is not None:
        fix = cuda_fix(backend, str(machine.cuda))
        return (f"a driver for CUDA {lacking}, where this one serves CUDA {machine.cuda}",), fix
    return (), ""


def _present(package: str) -> bool:
    return version_of(package) is not None if "-" in package else installed(package)


def _version(package: str) -> str:
    names = [package, *(name for b in BACKENDS.values() if b.modules[0] == package for _, name in b.distributions)]
    return next((version for name in names if (version := version_of(name))), "")


def _reason(path: str) -> str | None:
    try:
        choose_engines(open_bundle(path))
    except QieError as problem:
        return str(problem)
    return None
