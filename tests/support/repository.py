"""The files of the repository."""

from pathlib import Path

__all__ = ["FOLDERS", "MODULES", "ROOT", "SOURCES"]

ROOT = Path(__file__).parents[2]
FOLDERS = ("compiler", "engines", "recipes")
"""What the package ``qie`` consists of."""

SOURCES = sorted(path for folder in ("compiler", "engines") for path in (ROOT / folder).rglob("*.py"))
MODULES = [
    ".".join(("qie", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for path in SOURCES
]
"""Of ``SOURCES``, in the same order."""
