"""The tests in tests/gpu/trtllm, run here on the fake GPU and the stand-ins as ``make test-gpu-trtllm`` runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
PLUGIN = "tests.support.trtllm.plugin"
SCHEMES = ("none", "fp8")
"""One without a calibration and one with; the plugin runs the others as well, which takes as long for each."""


def words_of_make() -> list[str]:
    """The arguments of pytest in the Makefile."""
    (words,) = re.findall(r"-m pytest (tests/gpu/trtllm\b.*)", (ROOT / "Makefile").read_text())
    return words.split()


def test_they_pass_on_the_stand_ins() -> None:
    chosen = ["-k", " or ".join(SCHEMES)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN, *words_of_make(), *chosen],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts.keys() == {"passed", "deselected", "warnings"}, done.stdout
    assert counts["passed"] == 7 * len(SCHEMES), done.stdout
    for scheme in SCHEMES:
        assert re.search(rf"^test_prompt_embeds\[{scheme}\]: 0\.\d{{4}} from float32", done.stdout, re.MULTILINE)
