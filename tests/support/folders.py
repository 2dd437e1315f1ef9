"""Folders that a test makes and replaces."""

from pathlib import Path

from qie.engines.new_folders import replacing_folder

__all__ = ["MANIFEST", "make", "names", "replace_by"]

MANIFEST = "manifest.json"


def names(folder: Path) -> list[str]:
    """What is in ``folder``."""
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, content: str) -> Path:
    """A folder with a manifest and a file."""
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(content)
    (path / "weights").write_text(content)
    return path


def replace_by(path: Path, content: str) -> None:
    """Replace a folder by one that ``make`` would make."""
    with replacing_folder(path, lock=MANIFEST) as folder:
        (folder / MANIFEST).write_text(content)
        (folder / "weights").write_text(content)
