"""A process of a test that runs a script in the repository."""

import os
import subprocess
import sys

from tests.support.repository import ROOT

__all__ = ["run_python"]


def run_python(script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``script``, which may import ``tests``; ``environment`` is added to this process's."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
