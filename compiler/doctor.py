"""What this machine can build and run, and what to install for the rest."""

import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import qie
from qie.engines.backends import BACKENDS, cuda_needed
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
    """

    name: str
    ready: bool
    requirements: tuple[str, ...]
    missing: tuple[str, ...]
    fix: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleReport:
    """A bundle by name, and why it does not run here; None where it does."""

    name: str
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What this machine is, can do and holds."""

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
        capabilities=tuple(_capability(name, packages, fix, machine) for name, (packages, fix) in _needs().items()),
        bundles=tuple(BundleReport(name=path.name, reason=_reason(str(path))) for path in bundles()),
    )


def _needs() -> dict[str, tuple[tuple[str, ...], str]]:
    """Packages of every capability, and the command that installs them; names with a hyphen are distributions."""
    needs: dict[str, tuple[tuple[str, ...], str]] = {}
    for name, backend in BACKENDS.items():
        needs[f"{RUN} {name}"] = (backend.modules, backend.install)
    for name, backend in BACKENDS.items():
        if backend.gpu_package is not None and backend.gpu_install is not None:
            needs[f"{RUN} {name} {ON_GPU}"] = ((backend.gpu_package,), backend.gpu_install)
    builders = [backend for backend in BACKENDS.values() if backend.compiles and not backend.builds_on_gpu]
    return needs | {
        "build bundles for a CPU": (
            ("onnx", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"),
            "pip install 'qie[compile]'",
        ),
        "build bundles for a GPU": ((builders[0].build_module,), builders[0].build_install),
        "compare with diffusers": (("torch", "diffusers", "transformers"), "pip install 'qie[reference]'"),
    }


def _gpu_backend(name: str) -> str | None:
    """The backend whose engines the capability ``name`` runs on a GPU; None for another capability."""
    for backend, facts in BACKENDS.items():
        if facts.on_gpu and name == (f"{RUN} {backend} {ON_GPU}" if facts.on_cpu else f"{RUN} {backend}"):
            return backend
    return None


def _capability(name: str, packages: tuple[str, ...], fix: str, machine: Machine) -> Capability:
    installed = [package for package in packages if _installed(package)]
    missing = tuple(package for package in packages if package not in installed)
    backend = _gpu_backend(name)
    if not missing and backend is not None:
        missing, fix = _missing_of_gpu(backend, machine)
    return Capability(
        name=name,
        ready=not missing,
        requirements=tuple(f"{package} {_version(package)}".rstrip() for package in installed),
        missing=missing,
        fix=fix if missing else None,
    )


def _missing_of_gpu(backend: str, machine: Machine) -> tuple[tuple[str, ...], str]:
    """What ``backend`` lacks of GPU and driver, and how to fix that."""
    if not machine.gpus:
        return ("an NVIDIA GPU",), "use a machine whose `nvidia-smi` lists a GPU"
    needed, served = cuda_needed(backend), machine.cuda
    if served is not None and needed > int(served.partition(".")[0]):
        return (f"a driver for CUDA {needed}",), f"update the driver, which serves CUDA {served}"
    return (), ""


def _installed(package: str) -> bool:
    if "-" in package:
        return version_of(package) is not None
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False


def _version(package: str) -> str:
    names = [package, *(name for b in BACKENDS.values() if b.modules[0] == package for _, name in b.distributions)]
    return next((version for name in names if (version := version_of(name))), "")


def _reason(path: str) -> str | None:
    try:
        choose_engines(open_bundle(path))
    except QieError as problem:
        return str(problem)
    return None
