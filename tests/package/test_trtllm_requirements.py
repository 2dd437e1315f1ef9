"""What ``make test-gpu-trtllm`` installs, and where it ends with a reason."""

import importlib.util
import re
from types import ModuleType

import pytest

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


def test_everything_but_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-LLM decides on its version."""
    lines = SCRIPT.requirements(driver(monkeypatch, 13000, "8.9"), (3, 12))
    assert lines[0] == "--extra-index-url https://pypi.nvidia.com"
    names = [re.split(r"[<>=!\[;]", line)[0] for line in lines if not line.startswith("--")]
    assert {"tensorrt-llm", "cuda-python", "onnxruntime", "tokenizers", "onnxscript", "pytest"} <= set(names)
    assert "numpy" not in names
    assert any(line.startswith("tensorrt-llm==1.2.1") for line in lines)


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
