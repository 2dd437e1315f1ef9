"""``import qie``: its public names, that they are lazy, and that nothing else is exported."""

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest

import qie
from qie.engines import errors

FUNCTIONS_AND_CLASSES = {
    "Bundle",
    "Edit",
    "Editor",
    "EncoderCache",
    "Plan",
    "Progress",
    "Request",
    "add_schedule",
    "build",
    "open_bundle",
    "plan_build",
}
ERRORS = {name for name in errors.__all__ if name.endswith("Error")}

LAZY = """
import sys, qie
for name in sys.argv[1].split(","):
    getattr(qie, name)
watched = sys.argv[2].split(",")
print(*(name for name in watched if name in sys.modules))
"""
HEAVY = ("numpy", "PIL", "onnx", "onnxruntime", "tokenizers", "typer", "qie.compiler")


def loaded(*names: str) -> list[str]:
    """Which of the heavy packages the access to public names loads."""
    command = [sys.executable, "-W", "error", "-c", LAZY, ",".join(names), ",".join(HEAVY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_names_are_these() -> None:
    assert set(qie.__all__) == FUNCTIONS_AND_CLASSES | ERRORS | {"__version__"}
    assert dir(qie) == qie.__all__ == sorted(qie.__all__)


@pytest.mark.parametrize("name", qie.__all__)
def test_every_name_resolves(name: str) -> None:
    value = getattr(qie, name)
    if name not in ("__version__", "Progress"):
        assert value.__name__ == name
        assert value.__module__.startswith("qie.")
        assert pickle.loads(pickle.dumps(value)) is value


def test_progress_is_the_type_of_the_argument() -> None:
    assert qie.Progress == Callable[[str, int, int], None]
    assert qie.Editor.edit.__annotations__["progress"] == qie.Progress


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="module 'qie' has no attribute 'edit'"):
        qie.edit  # noqa: B018


def test_names_of_the_runtime_load_nothing_heavy() -> None:
    names = FUNCTIONS_AND_CLASSES - {"Plan", "add_schedule", "build", "plan_build"} | ERRORS
    assert loaded("__version__", *sorted(names)) == []
    assert loaded("add_schedule", "build", "plan_build") == ["qie.compiler"]
    assert "numpy" in loaded("Plan")
