"""What is installed of a backend, without an import of it."""

import importlib.machinery
from pathlib import Path

import pytest

from qie.engines import backends


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module onnxruntime, which a test fills."""
    finder = importlib.machinery.PathFinder()
    monkeypatch.setattr(backends, "find_spec", lambda name: finder.find_spec(name, [str(tmp_path)]))
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    return tmp_path / "onnxruntime"


def write(module: Path, stated: str) -> None:
    (module / "__init__.py").write_text("raise AssertionError('it was imported')")
    (module / "capi" / "build_and_package_info.py").write_text(f"package_name = 'x'\n{stated}")


def test_an_onnxruntime_for_a_gpu(module: Path) -> None:
    write(module, "cuda_version = '13.0'")
    assert backends.built_for_cuda() == "13.0"
    assert backends.cuda_needed("onnxruntime") == 13
    assert backends.cuda_lacking("onnxruntime", "12.8") == 13
    assert backends.cuda_lacking("onnxruntime", "13.1") is None


def test_an_onnxruntime_for_a_cpu(module: Path) -> None:
    write(module, "")
    assert backends.built_for_cuda() is None
    assert backends.cuda_needed("onnxruntime") == 0


def test_what_an_incomplete_removal_leaves_is_not_installed(module: Path) -> None:
    (module / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    assert not backends.available("onnxruntime")
    assert backends.built_for_cuda() is None
    write(module, "")
    assert backends.available("onnxruntime")
