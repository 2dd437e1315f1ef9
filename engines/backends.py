"""Backends: who executes the engines, and every fact of each, one row a backend."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from qie.engines.errors import BackendMissingError
from qie.engines.machine import version_of

__all__ = ["BACKENDS", "Backend", "available", "cuda_needed", "distribution", "installed", "serves_gpu", "version"]


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
    return backend in BACKENDS and all(installed(module) for module in BACKENDS[backend].modules)


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


def installed(module: str) -> bool:
    """True where ``module`` can be found; it is not imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False
