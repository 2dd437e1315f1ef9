"""What ``make test-gpu-trtllm`` installs, and where it ends with a reason."""

import importlib.util
import re
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from qie.engines import gpus
from tests.support.libcuda import Libcuda, StandIn
from tests.support.repository import ROOT


def script() -> ModuleType:
    """tests/gpu/trtllm/requirements.py, which is not part of a package."""
    path = ROOT / "tests" / "gpu" / "trtllm" / "requirements.py"
    spec = importlib.util.spec_from_file_location("trtllm_requirements", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = script()


def driver(monkeypatch: pytest.MonkeyPatch, cuda: int, *capabilities: str) -> gpus.Driver:
    library = Libcuda([StandIn(name="GPU", capability=each) for each in capabilities], cuda=cuda)
    monkeypatch.setattr(gpus, "libcuda", lambda: library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return gpus.find_driver()


PINNED = {"numpy": "1.26.4", "onnx": "1.19.1"}
"""The latest versions that TensorRT-LLM 1.2.1 allows (its requirements.txt), of those that are not the latest."""


def test_what_is_installed_goes_with_tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = SCRIPT.requirements(driver(monkeypatch, 13000, "8.9"), (3, 12))
    assert lines[0] == "--extra-index-url https://pypi.nvidia.com"
    wanted = {each.name: each for each in map(Requirement, (line for line in lines if not line.startswith("--")))}
    assert {"tensorrt-llm", "cuda-python", "onnxruntime", "tokenizers", "onnxscript", "pytest"} <= wanted.keys()
    assert str(wanted["tensorrt-llm"].specifier) == "==1.2.1"
    for name, version in PINNED.items():
        assert wanted[name].specifier.contains(version)


@pytest.mark.parametrize(
    ("cuda", "capabilities", "python", "reason"),
    [
        (13000, (), (3, 12), "CUDA finds no GPU here"),
        (12080, ("8.9",), (3, 12), "the NVIDIA driver serves CUDA 12.8, expected 13 or later; update the driver"),
        (13000, ("8.9",), (3, 11), "Python is 3.11, expected 3.12; name it, as in: make test-gpu-trtllm PYTHON="),
    ],
)
def test_where_nothing_can_run(
    monkeypatch: pytest.MonkeyPatch, cuda: int, capabilities: tuple[str, ...], python: tuple[int, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        SCRIPT.requirements(driver(monkeypatch, cuda, *capabilities), python)
