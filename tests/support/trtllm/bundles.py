"""Bundles with the language model on TensorRT-LLM: built here, finished by the stand-in trtllm-build on a fake GPU."""

import os
from pathlib import Path

import pytest

from qie.compiler.packing.finish import finish_bundle
from qie.engines.bundle.bundle import Bundle
from tests.support.bundles import build
from tests.support.fake_gpu import Gpu
from tests.support.trtllm.build import VERSION, install_command
from tests.support.trtllm.runtime import install_runtime

RECIPE = """
gpu = "L40S"
compute_capability = "8.9"
memory_gib = 44.5
backends = ["onnxruntime"]
modulation = "weights"

[components.language]
backend = "tensorrt-llm"
"""
"""onnxruntime for the rest, which compiles nothing: its graphs are built and not run."""


def install(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, folder: Path, *, version: str = VERSION) -> None:
    """Put ``gpu``, the runtime and trtllm-build, whose program goes into ``folder``, in the place of real ones."""
    from qie.compiler.backends.tensorrt_llm import builder
    from qie.engines import backends

    gpu.install(monkeypatch)
    install_runtime(gpu, monkeypatch, version)
    install_command(folder, capability=gpu.capability, tensorrt=gpu.version, version=version)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(builder, "installed", backends.installed)
    known = backends.version_of
    packages = {"tensorrt-llm": version, "cuda-bindings": known("cuda-bindings")}
    monkeypatch.setattr(backends, "version_of", lambda package: packages.get(package) or known(package))


def built(checkpoint: Path, destination: Path, more: str = "", calibration: Path | None = None) -> Bundle:
    """The bundle of ``checkpoint`` as a machine without GPU leaves it."""
    return build(checkpoint, destination, f"{RECIPE}{more}", calibration=calibration)


def finished(bundle: Bundle) -> Bundle:
    """The bundle with the engine of TensorRT-LLM."""
    return finish_bundle(bundle)
