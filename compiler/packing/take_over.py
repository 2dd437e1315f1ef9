"""Takes files over from an earlier bundle into the folder of a new one."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import FileRecord
from qie.engines.files import sha256_of

__all__ = ["take_over"]


def take_over(records: Sequence[FileRecord], old: Bundle, folder: Path) -> bool:
    """Link files from the bundle ``old``; where one is damaged, link none and return False."""
    targets = [folder / record.path for record in records]
    try:
        for record, target in zip(records, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            old.folder.read(partial(_link, record.path, target))
            if sha256_of(target) != record.sha256:
                raise FileNotFoundError(record.path)
    except FileNotFoundError:
        for target in targets:
            target.unlink(missing_ok=True)
        return False
    return True


def _link(name: str, target: Path, old: Path) -> None:
    """Give the file ``name`` of the folder ``old``, links followed, the second name ``target``, or copy it."""
    target.unlink(missing_ok=True)
    file = os.path.realpath(old / name)
    try:
        os.link(file, target)
    except OSError:
        shutil.copy(file, target)
