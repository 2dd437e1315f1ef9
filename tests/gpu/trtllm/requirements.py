"""Print what pip must install for the tests of TensorRT-LLM on the GPU of this machine.

It runs before anything is installed, as tests/gpu/requirements.py does, whose functions it uses by their path.
TensorRT-LLM has an environment of its own, because it pins torch, TensorRT, numpy below 2 and onnx below 1.20, all of
which qie's metadata allows.
Sources: TensorRT-LLM's requirements.txt, and NVIDIA's guide "Installing on Linux via pip" (Python 3.12, PyTorch for
CUDA 13, libopenmpi-dev).
"""

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

PYTHON = (3, 12)
"""The only version that both qie and the wheel of 1.2.1 serve."""

INDEX = "https://pypi.nvidia.com"
TORCH_INDEX = "https://download.pytorch.org/whl/cu130"
MAIN = Path(__file__).parents[1] / "requirements.py"
PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def main() -> None:
    """Print the lines of a requirements file, or end with the reason why there is none."""
    common = load(MAIN)
    try:
        driver = common.load(common.GPUS).find_driver()
        print("\n".join(requirements(driver, sys.version_info[:2])))  # noqa: T201
    except ValueError as problem:
        sys.exit(f"the tests of TensorRT-LLM cannot run here: {problem}")


def load(file: Path) -> ModuleType:
    """Import a file that is not part of an installed package."""
    spec = importlib.util.spec_from_file_location("requirements_of_gpu_tests", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements(driver: Any, python: tuple[int, ...]) -> list[str]:
    """The lines of the requirements file for a ``qie.engines.gpus.Driver``.

    Raises:
        ValueError: there is no GPU, the driver is too old, or Python is another one.
    """
    if not driver.gpus:
        raise ValueError(driver.no_gpu)
    if int(str(driver.cuda).partition(".")[0]) < 13:
        raise ValueError(f"the NVIDIA driver serves CUDA {driver.cuda}, expected 13 or later; update the driver")
    if python != PYTHON:
        found, expected = (".".join(map(str, version)) for version in (python, PYTHON))
        raise ValueError(
            f"Python is {found}, expected {expected}; name it, as in: make test-gpu-trtllm PYTHON=python{expected}"
        )
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    indices = [f"--extra-index-url {index}" for index in (INDEX, TORCH_INDEX)]
    return [*indices, *extras["trtllm"], *project["dependencies"], *extras["compile"], "pytest"]


if __name__ == "__main__":
    main()
