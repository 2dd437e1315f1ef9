"""Backends: who executes the engines. One file each, all behind the Session protocol."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from qie.engines.errors import BackendMissingError
from qie.engines.manifest import EngineRecord
from qie.engines.sessions.session import Session, Tensor

__all__ = ["BACKENDS", "Session", "Tensor", "available", "load"]

BACKENDS: dict[str, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime", "pip install qie"),
}
"""Backend that this qie executes: the module that it needs, and the command that installs it."""


def available(backend: str) -> bool:
    """True where ``backend`` is known and its package is installed; nothing is imported."""
    return backend in BACKENDS and find_spec(BACKENDS[backend][0]) is not None


def load(folder: Path, engine: EngineRecord) -> Session:
    """Load ``engine`` of the bundle ``folder`` with its backend.

    Raises:
        BackendMissingError: the backend's package is not installed.
        BundleError: the backend cannot load the engine.
    """
    if not available(engine.backend):
        raise BackendMissingError(
            f"{engine.component} is built for {engine.backend}, which is not installed here; "
            f"run `{BACKENDS.get(engine.backend, ('', 'pip install --upgrade qie'))[1]}`"
        )
    return _LOADERS[engine.backend](folder, engine)


def _onnxruntime(folder: Path, engine: EngineRecord) -> Session:
    from qie.engines.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(folder, engine)


_LOADERS: dict[str, Callable[[Path, EngineRecord], Session]] = {"onnxruntime": _onnxruntime}
