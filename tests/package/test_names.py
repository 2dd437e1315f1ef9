"""What ``__all__`` holds: every name that another module imports."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.support.repository import MODULES, ROOT, SOURCES


def not_listed(source: str) -> list[str]:
    """The names that ``source`` imports from modules of qie that do not have them in ``__all__``."""
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qie.")
        for alias in node.names
        if f"{node.module}.{alias.name}" not in MODULES
    ]
    return [f"{module}.{name}" for module, name in imported if name not in importlib.import_module(str(module)).__all__]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_names_are_in_all(path: Path) -> None:
    assert not_listed(path.read_text(encoding="utf-8")) == []


def test_a_name_that_is_not_listed_is_found() -> None:
    source = "from qie.engines.files import sha256_of, shutil\nfrom qie.engines import files\nimport json\n"
    assert not_listed(source) == ["qie.engines.files.shutil"]
