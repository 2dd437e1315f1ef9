"""Public names, and what modules import."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import MODULES

NOT_IN_ENGINES = (
    "diffusers", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy", "rich",
    "safetensors", "torch", "torchvision", "transformers",
)  # fmt: skip
NOT_IN_COMPILER = ("accelerate", "diffusers", "rich", "torch", "torchvision", "transformers")

IMPORT = """
import importlib, sys
blocked, modules = (words.split(",") for words in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))
failed = False
for module in modules:
    for name in [name for name in sys.modules if name.split(".")[0] == "qie"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except ImportError as problem:
        failed = True
        print(f"{module}: {problem}")
sys.exit(failed)
"""
"""Imports each module as the first one of qie, with None in the place of every blocked package."""


def defined_names(source: str) -> Iterator[str]:
    """Yield the names that a module's own top-level statements define."""
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case _:
                pass


@pytest.mark.parametrize(("name", "path"), MODULES.items(), ids=MODULES)
def test_a_module_lists_its_public_names(name: str, path: Path) -> None:
    public = {word for word in defined_names(path.read_text(encoding="utf-8")) if not word.startswith("_")}
    listed = getattr(importlib.import_module(name), "__all__", None)
    assert public == set() or listed, f"{name} defines {', '.join(sorted(public))} and has no __all__"


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert [word for word in listed if not hasattr(module, word)] == []
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("qie.engines", NOT_IN_ENGINES), ("qie.compiler", NOT_IN_COMPILER)],
    ids=["engines", "compiler"],
)
def test_every_module_imports_without(package: str, blocked: tuple[str, ...]) -> None:
    modules = [name for name in MODULES if name == package or name.startswith(package + ".")]
    done = run_import(blocked, modules)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_test_of_imports_can_fail() -> None:
    done = run_import(("numpy",), ["qie.engines", "qie.engines.inputs.rotary"])
    assert done.returncode == 1
    assert done.stdout.startswith("qie.engines.inputs.rotary: ")


def run_import(blocked: tuple[str, ...], modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Import ``modules`` in a process of its own where the packages ``blocked`` seem not to be installed."""
    command = [sys.executable, "-c", IMPORT, ",".join(blocked), ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


READERS = ["qie.engines.bundle.manifest", "qie.engines.bundle.bundle", "qie.compiler.recipe.load"]
HEAVY = {"PIL", "numpy", "onnxruntime", "tokenizers"}


@pytest.mark.parametrize("module", READERS)
def test_reading_a_manifest_or_a_recipe_imports_nothing_heavy(module: str) -> None:
    script = f"import {module}, sys; print(sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
