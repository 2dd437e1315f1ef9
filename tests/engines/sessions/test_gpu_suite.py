"""The tests in tests/gpu: deselected without a GPU, and run here on the fake GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qie.engines.machine import this_machine

ROOT = Path(__file__).parents[3]

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
import pytest
sys.exit(pytest.main())
"""
"""Runs pytest where some packages seem not to be installed."""

NOT_INSTALLED = "accelerate,dashscope,diffusers,skimage,sklearn,torch,torchvision,transformers"
"""Packages that ``make test-gpu`` does not install, of those that other tests need."""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, NOT_INSTALLED, "-q", "-p", "no:cacheprovider", "tests/gpu", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_they_are_deselected_without_a_gpu() -> None:
    if this_machine().gpus:
        pytest.skip("this machine has a GPU")
    output = run().stdout
    assert re.search(r"^\d+ deselected", output, re.MULTILINE), output
    assert "passed" not in output


def test_a_required_gpu_that_is_not_there_is_a_failure() -> None:
    if this_machine().gpus:
        pytest.skip("this machine has a GPU")
    done = run("--require-gpu")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    last = done.stdout.splitlines()[-1]
    assert last == "no test ran on a GPU: qie sees none here; `qie doctor` lists what is missing"


def test_a_run_in_which_every_backend_is_skipped_is_a_failure() -> None:
    done = run("-p", "tests.support.fake_gpu_plugin", "--require-gpu", "-k", "onnxruntime")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert re.search(r"^SKIPPED .*the fake does not execute onnxruntime$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("no test ran on a GPU: every backend was skipped or failed, see ")


@pytest.mark.parametrize(
    ("chosen", "most"), [("tensorrt-rtx and not memory", 20), pytest.param("", 60, marks=pytest.mark.soak)]
)
def test_they_pass_on_the_fake(chosen: str, most: int) -> None:
    done = run("-p", "tests.support.fake_gpu_plugin", "--require-gpu", "-k", chosen)
    output = done.stdout
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    assert counts.get("failed", 0) == counts.get("error", 0) == done.returncode == 0, output
    assert counts["passed"] >= most, output
    assert output.count("the fake does not execute onnxruntime") == output.count("SKIPPED"), output
    assert re.search(r"^test_parity\[tensorrt-rtx-transformer\]: 0\.\d{4}", output, re.MULTILINE), output
    assert "homes of the tests: 1" in output
