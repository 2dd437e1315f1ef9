"""The Makefile on machines that lack what it needs: one sentence, and nothing is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qie.engines.machine import this_machine
from tests.support.repository import ROOT

OLD_PYTHON = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = (3, 10, 12); sys.version = "3.10.12 (main)"; exec(sys.argv[1])' "$2"
"""
"""Runs ``-c CODE`` and says that it is Python 3.10, the default of Ubuntu 22.04."""


def make(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_the_soak_runs_every_file_that_leaves_something_to_it() -> None:
    words = make("--dry-run", "test-soak").stdout.split()
    folders = {ROOT / word for word in words if word.startswith("tests/")}
    leaving = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^from tests\.support\.soak import|pytest\.mark\.soak\b", path.read_text(), re.MULTILINE)
        and path != Path(__file__)
    ]
    assert len(leaving) > 10
    assert [path for path in leaving if not folders & {path, *path.parents}] == []


def test_an_old_python(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(OLD_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    done = make("test-gpu", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"qie needs Python 3.11 or newer, {python} is 3.10.12; name another one, as in: make test-gpu PYTHON=python3.12"
    )
    assert done.stdout == ""
    assert not (tmp_path / "venv").exists()


def test_no_gpu(tmp_path: Path) -> None:
    if this_machine().gpus:
        pytest.skip("this machine has a GPU")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = make("test-gpu", f"VENV={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith("the tests on a GPU cannot run here: ")
    assert done.stdout == ""
    assert not (tmp_path / "gpu.stamp").exists()
