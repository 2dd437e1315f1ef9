"""What each command imports, and what it says where that is not installed."""

import re
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.command_line import RUN

HEAVY = (
    "accelerate", "diffusers", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy",
    "safetensors", "torch", "transformers",
)  # fmt: skip
RUNTIME = ("numpy", "onnxruntime", "PIL", "tokenizers")

WATCHED = """
import sys
blocked, watched, *words = sys.argv[1:]
sys.modules.update(dict.fromkeys(filter(None, blocked.split(","))))
sys.argv = ["qie", *words]
from qie.compiler.cli.main import main
try:
    main()
finally:
    print("LOADED", *(name for name in watched.split(",") if sys.modules.get(name)))
"""
"""Runs a command where the packages ``blocked`` seem not to be installed, then tells which of ``watched`` it loaded."""


def watched(*words: str | Path, blocked: tuple[str, ...] = (), watch: tuple[str, ...] = HEAVY) -> CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WATCHED, ",".join(blocked), ",".join(watch), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def loaded(done: CompletedProcess[str]) -> list[str]:
    return done.stdout.splitlines()[-1].split()[1:]


def test_help_imports_nothing(workplace: Path) -> None:
    done = watched("--help", watch=HEAVY + RUNTIME)
    assert done.returncode == 0, done.stderr
    assert loaded(done) == []


def test_an_edit_imports_the_runtime_alone(workplace: Path, bundle: Path) -> None:
    done = watched("run", "photo.png", "make it red", "--bundle", bundle, "--steps", "2", watch=HEAVY + RUNTIME)
    assert done.returncode == 0, done.stderr
    assert Path("photo-edited.png").is_file()
    assert loaded(done) == list(RUNTIME)


def test_the_test_of_imports_can_fail(checkpoint: Path, workplace: Path) -> None:
    assert "onnxscript" in loaded(watched("build", checkpoint, "--dry-run"))


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("run", "photo.png", "x", *RUN), ("list",), ("inspect", "mine"),
              ("doctor",), ("recipes",), ("recipes", "show", "l40s"), ("rm", "mine", "--yes")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_the_thin_runtime_works_alone(words: tuple[str, ...], workplace: Path, named_bundle: str) -> None:
    done = watched(*words, blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if words == ("doctor",):
        assert re.search(
            r"^build bundles for a CPU +no .*\n +missing: .*\n +fix: pip install 'qie\[compile\]'$",
            done.stdout,
            re.MULTILINE,
        )


@pytest.mark.parametrize(
    "words", [("build",), ("export",), ("plan",), ("golden",), ("calibrate", "--images", ".")], ids=lambda w: w[0]
)
def test_building_says_what_to_install(words: tuple[str, ...], workplace: Path, checkpoint: Path) -> None:
    done = watched(*words, checkpoint, blocked=HEAVY)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \w+ is not installed, and compiling needs it; run `pip install 'qie\[compile\]'`\n", done.stderr
    )
