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

__all__ = ["Ability", "BundleReport", "Report", "examine"]

RUN = "run engines of"
ON_GPU = "on a GPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Something that qie can do where some packages are installed: those found, and how to get the missing ones."""

    what: str
    ready: bool
    found: tuple[str, ...]
    missing: tuple[str, ...]
    mend: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleReport:
    """A bundle with a name, and why it does not run here (None where it does)."""

    name: str
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of an examination."""

    qie: str
    python: str
    machine: Machine
    home: str
    free_bytes: int
    abilities: tuple[Ability, ...]
    bundles: tuple[BundleReport, ...]


def examine() -> Report:
    """Look at the machine, the installed packages and the bundles; nothing heavy is imported."""
    home = qie_home()
    machine = this_machine()
    return Report(
        qie=qie.__version__,
        python=platform.python_version(),
        machine=machine,
        home=str(home),
        free_bytes=shutil.disk_usage(existing(home)).free,
        abilities=tuple(_ability(what, packages, mend, machine) for what, (packages, mend) in _needs().items()),
        bundles=tuple(BundleReport(name=path.name, reason=_reason(str(path))) for path in bundles()),
    )


def _needs() -> dict[str, tuple[tuple[str, ...], str]]:
    """Ability: what it takes, and the command that installs it. Names with a hyphen are packages, others modules."""
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
        "compare with the reference": (("torch", "diffusers", "transformers"), "pip install 'qie[reference]'"),
    }


def _gpu_backend(what: str) -> str | None:
    """The backend whose engines on a GPU ``what`` is about; None where it is about something else."""
    for name, backend in BACKENDS.items():
        if backend.on_gpu and what == (f"{RUN} {name} {ON_GPU}" if backend.on_cpu else f"{RUN} {name}"):
            return name
    return None


def _ability(what: str, packages: tuple[str, ...], mend: str, machine: Machine) -> Ability:
    found = [package for package in packages if _installed(package)]
    missing = tuple(package for package in packages if package not in found)
    backend = _gpu_backend(what)
    if not missing and backend is not None:
        missing, mend = _missing_of_gpu(backend, machine)
    return Ability(
        what=what,
        ready=not missing,
        found=tuple(f"{package} {_version(package)}".rstrip() for package in found),
        missing=missing,
        mend=mend if missing else None,
    )


def _missing_of_gpu(backend: str, machine: Machine) -> tuple[tuple[str, ...], str]:
    """What of GPU and driver is missing for ``backend``, and what to do about it."""
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
