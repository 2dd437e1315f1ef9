"""The files of the repository."""

from pathlib import Path

__all__ = ["FOLDERS", "MODULES", "ROOT", "SOURCES", "module_of"]

ROOT = Path(__file__).parents[2]
FOLDERS = ("compiler", "engines", "recipes")
"""What the package ``qie`` consists of."""

SOURCES = sorted(path for folder in ("compiler", "engines") for path in (ROOT / folder).rglob("*.py"))
_FOREIGN = (ROOT / "compiler/backends/tensorrt_llm/encoder.py",)
"""What only another program loads: trtllm-build. It imports that program's package."""


def module_of(path: Path) -> str:
    """The name under which qie imports one of ``SOURCES``."""
    return ".".join(("qie", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES if path not in _FOREIGN}
"""Name and file of everything that qie imports."""
