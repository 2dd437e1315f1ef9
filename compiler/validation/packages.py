"""The packages of the reference, imported when first needed: they are large, and validation itself needs none."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qie.engines.errors import BackendMissingError

__all__ = ["import_package", "quiet", "reference_packages"]


def import_package(name: str) -> Any:
    """A module of ``qie[reference]``.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendMissingError(
            f"{name} is not installed ({error}), which the reference needs; run `pip install 'qie[reference]'`"
        ) from error


def reference_packages() -> tuple[tuple[str, str], ...]:
    """The packages that compute the reference, and their versions.

    Raises:
        BackendMissingError: one is not installed.
    """
    return tuple((name, str(import_package(name).__version__)) for name in ("torch", "diffusers", "transformers"))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, loading neither draws bars nor warns of what every checkpoint has."""
    logs = [import_package(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
