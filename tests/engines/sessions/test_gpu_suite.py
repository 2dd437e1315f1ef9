"""The tests in tests/gpu: deselected without a GPU, and run here on the fake GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qie.engines.machine import this_machine

ROOT = Path(__file__).parents[3]


def run(*words: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_they_are_deselected_without_a_gpu() -> None:
    if this_machine().gpus:
        pytest.skip("this machine has a GPU")
    output = run()
    assert re.search(r"^\d+ deselected", output, re.MULTILINE), output
    assert "passed" not in output


def test_they_pass_on_the_fake() -> None:
    output = run("-p", "tests.support.fake_gpu_plugin")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    assert counts.get("failed", 0) == counts.get("error", 0) == 0, output
    assert counts["passed"] >= 60, output
    assert output.count("the fake does not execute onnxruntime") == output.count("SKIPPED"), output
