"""What this machine can build and run, and what to install for the rest."""

import platform
import shutil
from dataclasses import dataclass

import qie
from qie.engines.bundle import bundles, choose_engines, open_bundle
from qie.engines.errors import QieError
from qie.engines.files import qie_home
from qie.engines.machine import Machine, this_machine, version_of
from qie.engines.sessions import BACKENDS

__all__ = ["Ability", "BundleReport", "Report", "examine"]

NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "run engines of onnxruntime": (("onnxruntime",), BACKENDS["onnxruntime"][1]),
    "build bundles for a CPU": (
        ("onnx", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"),
        "pip install 'qie[compile]'",
    ),
    "compare with the reference": (("torch", "diffusers", "transformers"), "pip install 'qie[reference]'"),
}
"""Ability: the packages that it takes, and the command that brings them."""


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
    existing = next(p for p in (home, *home.parents) if p.exists())
    return Report(
        qie=qie.__version__,
        python=platform.python_version(),
        machine=this_machine(),
        home=str(home),
        free_bytes=shutil.disk_usage(existing).free,
        abilities=tuple(_ability(what, packages, mend) for what, (packages, mend) in NEEDS.items()),
        bundles=tuple(BundleReport(name=path.name, reason=_reason(str(path))) for path in bundles()),
    )


def _ability(what: str, packages: tuple[str, ...], mend: str) -> Ability:
    versions = {package: version_of(package) for package in packages}
    missing = tuple(package for package, version in versions.items() if version is None)
    return Ability(
        what=what,
        ready=not missing,
        found=tuple(f"{package} {version}" for package, version in versions.items() if version is not None),
        missing=missing,
        mend=mend if missing else None,
    )


def _reason(path: str) -> str | None:
    try:
        choose_engines(open_bundle(path))
    except QieError as problem:
        return str(problem)
    return None
