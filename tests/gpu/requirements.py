"""Print what pip must install for the tests on the GPUs of this machine: ``python tests/gpu/requirements.py``.

It runs before anything is installed, so it imports only the standard library, and ``engines/gpus.py``, which does the
same, by its path.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

RTX = frozenset(("7.5", "8.6", "8.9", "12.0", "12.1"))
"""Compute capabilities that NVIDIA lists for TensorRT for RTX; TensorRT serves the others."""

GPUS = Path(__file__).parents[2] / "engines" / "gpus.py"


def main() -> None:
    """Print the lines of a requirements file, or end with the reason why there is none."""
    try:
        print("\n".join(requirements(load(GPUS).find_driver())))  # noqa: T201
    except ValueError as problem:
        sys.exit(f"the tests on a GPU cannot run here: {problem}")


def load(file: Path) -> ModuleType:
    """Import a file that is not part of an installed package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(driver: Any) -> list[str]:
    """The lines of the requirements file for a ``qie.engines.gpus.Driver``.

    Raises:
        ValueError: there is no GPU, or its driver is too old for every version of TensorRT.
    """
    if not driver.gpus:
        raise ValueError(driver.no_gpu)
    cuda = int(str(driver.cuda).partition(".")[0])
    if cuda < 12:
        raise ValueError(f"the NVIDIA driver serves CUDA {driver.cuda}, expected 12 or later; update the driver")
    capabilities = {gpu.compute_capability for gpu in driver.gpus}
    extras = ["compile"]
    extras += ["rtx"] if capabilities & RTX else []
    extras += ["tensorrt"] if capabilities - RTX else []
    return [f"--editable .[{','.join(extras)}]", "cuda-python<13" if cuda == 12 else "cuda-python>=13", "pytest"]


if __name__ == "__main__":
    main()
