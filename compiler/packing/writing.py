"""Folders that a build replaces, and what a full disk is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import MANIFEST
from qie.engines.errors import BuildError
from qie.engines.files import is_disk_full
from qie.engines.new_folders import ReplacedError, replacing_folder

__all__ = ["check_unchanged", "disk_errors", "writing"]


@contextmanager
def writing(destination: Path, needed: int, *, lock: str = MANIFEST, replaces: Bundle | None = None) -> Iterator[Path]:
    """A folder that replaces ``destination`` when the block succeeds.

    Args:
        destination: of the folder.
        needed: bytes, for the error message.
        lock: see ``replacing_folder``.
        replaces: the bundle that is replaced; None for whatever is there.

    Raises:
        BuildError: the folder cannot be written, the disk is full, or ``replaces`` was replaced or deleted.
    """
    held = None if replaces is None else replaces.folder
    with disk_errors(destination, needed), replacing_folder(destination, lock=lock, replaces=held) as folder:
        yield folder


@contextmanager
def disk_errors(destination: Path, needed: int) -> Iterator[None]:
    """Around everything that is written to the disk of ``destination``, where ``needed`` bytes are needed.

    Raises:
        BuildError: it cannot be written, the disk is full, or the folder to replace is another one than was read.
    """
    try:
        yield
    except ReplacedError as problem:
        raise BuildError(f"{destination} was changed meanwhile; start again") from problem
    except OSError as problem:
        if is_disk_full(problem):
            raise BuildError(
                f"the disk of {destination} is full, {needed:,} bytes are needed; free some space or choose a folder "
                "on another disk",
                option="out",
            ) from problem
        raise BuildError(
            f"{destination} cannot be written ({problem}); choose another folder", option="out"
        ) from problem


def check_unchanged(bundle: Bundle) -> None:
    """Reject to replace a bundle that is another one now than when it was opened.

    Raises:
        BuildError: it was replaced or deleted.
    """
    if bundle.folder.replaced:
        raise BuildError(f"{bundle.path} was changed meanwhile; start again")
