"""The tests in tests/gpu: left out where there is no GPU, and run here on the fake, to be ready for a card."""

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
    said = run()
    assert re.search(r"^\d+ deselected", said, re.MULTILINE), said
    assert "passed" not in said


def test_they_pass_on_the_fake() -> None:
    said = run("-p", "tests.support.pretend")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", said)}
    assert counts.get("failed", 0) == counts.get("error", 0) == 0, said
    assert counts["passed"] >= 60, said
    assert said.count("the fake does not execute onnxruntime") == said.count("SKIPPED"), said
