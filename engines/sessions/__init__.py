"""Backends: who executes the engines. One file each, all behind the Session protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qie.engines.errors import BackendMissingError
from qie.engines.machine import version_of
from qie.engines.manifest import EngineRecord
from qie.engines.sessions.session import Session, Tensor

if TYPE_CHECKING:
    from qie.engines.sessions.device import Device

__all__ = [
    "BACKENDS",
    "Backend",
    "Session",
    "Tensor",
    "available",
    "cuda_needed",
    "distribution",
    "load",
    "open_device",
    "serves_gpu",
    "version",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What a backend needs: its modules, the executing one first, and the command that installs them.

    ``distributions`` are the packages that may hold the executing module, with the CUDA that they are made for.
    ``bound`` backends run only what their own version built.
    """

    modules: tuple[str, ...]
    install: str
    distributions: tuple[tuple[int, str], ...] = ()
    bound: bool = False


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(modules=("onnxruntime",), install="pip install qie"),
    "tensorrt-rtx": Backend(
        modules=("tensorrt_rtx", "cuda.bindings"),
        install="pip install 'qie[rtx]'",
        distributions=((12, "tensorrt-rtx-cu12"), (13, "tensorrt-rtx-cu13")),
        bound=True,
    ),
    "tensorrt": Backend(
        modules=("tensorrt", "cuda.bindings"),
        install="pip install 'qie[tensorrt]'",
        distributions=((12, "tensorrt-cu12"), (13, "tensorrt-cu13")),
        bound=True,
    ),
}
"""The backends that this qie executes."""


def available(backend: str) -> bool:
    """True where ``backend`` is known and its packages are installed; nothing is imported."""
    return backend in BACKENDS and all(_installed(module) for module in BACKENDS[backend].modules)


def version(backend: str) -> str:
    """The version of an available backend, as its module says it.

    Raises:
        BackendMissingError: the module does not load.
    """
    try:
        return str(import_module(BACKENDS[backend].modules[0]).__version__)
    except (ImportError, OSError) as problem:
        raise BackendMissingError(
            f"{backend} is installed but does not load ({problem}); install it again with `{BACKENDS[backend].install}`"
        ) from problem


def serves_gpu() -> bool:
    """True where the installed onnxruntime can use a GPU."""
    return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()


def cuda_needed(backend: str) -> int:
    """The major version of CUDA that the driver must serve for what is installed of ``backend``; 0 if none."""
    majors = [major for major, package in BACKENDS[backend].distributions if version_of(package)]
    return max([*majors, int((version_of("cuda-bindings") or "0").partition(".")[0])])


def distribution(backend: str) -> str:
    """The package that holds what executes ``backend``, by the name that pip knows."""
    names = [package for _, package in BACKENDS[backend].distributions]
    return next((name for name in names if version_of(name)), backend)


def open_device(engines: Iterable[EngineRecord], *, graphs: bool = True) -> Device | None:
    """What the sessions of ``engines`` share on a GPU; None where none of them takes part.

    ``graphs`` allows them to work with CUDA graphs.

    Raises:
        EngineMismatchError: CUDA offers no GPU of the engines' compute capability.
    """
    for engine in engines:
        if engine.backend in ("tensorrt", "tensorrt-rtx"):
            from qie.engines.sessions.device import Device

            return Device(engine.compute_capability, graphs=graphs)
    return None


def load(folder: Path, engine: EngineRecord, device: Device | None = None) -> Session:
    """Load ``engine`` of the bundle ``folder`` with its backend, on the ``device`` that ``open_device`` gave.

    Raises:
        BackendMissingError: the backend's package is not installed.
        BundleError: the backend cannot load the engine.
        EditError: the GPU has no room for it.
    """
    if not available(engine.backend):
        known = BACKENDS.get(engine.backend)
        raise BackendMissingError(
            f"{engine.component} is built for {engine.backend}, which is not installed here; "
            f"run `{known.install if known else 'pip install --upgrade qie'}`"
        )
    return _LOADERS[engine.backend](folder, engine, device)


def _onnxruntime(folder: Path, engine: EngineRecord, device: Device | None) -> Session:
    from qie.engines.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(folder, engine)


def _tensorrt(folder: Path, engine: EngineRecord, device: Device | None) -> Session:
    from qie.engines.sessions.tensorrt import TensorRtSession

    assert device is not None
    return TensorRtSession(folder, engine, device)


_LOADERS: dict[str, Callable[[Path, EngineRecord, Device | None], Session]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt,
    "tensorrt": _tensorrt,
}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False
