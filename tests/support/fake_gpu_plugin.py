"""A pytest plugin that runs tests/gpu on the fake GPU: everything but the builder.

PYTHONPATH=. pytest -p tests.support.fake_gpu_plugin tests/gpu
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.sessions.choose import choose_engines
from tests.support import gpu_bundles
from tests.support.bundles import build
from tests.support.fake_gpu import Gpu

GPU = Gpu()
BACKENDS = ("tensorrt-rtx", "tensorrt")
BUILT: dict[Path, Path] = {}
HOMES: set[str] = set()


def build_for_gpu(checkpoint: Path, destination: Path, backend: str, residency: str = "resident") -> Bundle:
    """Replace ``gpu_bundles.build_for_gpu`` with one whose engines the fake executes."""
    if backend not in BACKENDS:
        pytest.skip(f"the fake does not execute {backend}")
    if checkpoint not in BUILT:
        BUILT[checkpoint] = build(checkpoint, destination.parent / "on-cpu").path
    bundle = open_bundle(str(GPU.retarget(BUILT[checkpoint], destination, backend, residency=residency)))
    choose_engines(bundle)
    return bundle


def pytest_runtest_call() -> None:
    HOMES.add(os.environ["QIE_HOME"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"homes of the tests: {len(HOMES)}")


patch = pytest.MonkeyPatch()
patch.setattr(gpu_bundles, "PROLOGUE", "import tests.support.fake_gpu_plugin\n")
GPU.install(patch, *BACKENDS)
patch.setattr(gpu_bundles, "build_for_gpu", build_for_gpu)
narrow = {"num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "text_hidden_size": 512}
narrow_text = {"text_heads": 4, "text_intermediate_size": 1024, "text_layers": 2}
patch.setattr(gpu_bundles, "WIDE", replace(gpu_bundles.WIDE, **narrow, **narrow_text))
