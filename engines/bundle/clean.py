"""What qie keeps on this machine beside bundles and need not: leftovers of stopped builds, and caches."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from qie.engines.bundle.bundle import bundles_folder
from qie.engines.files import leftovers_of, qie_home, size_of
from qie.engines.folders import is_held, leftovers, remove_leftover

__all__ = ["CALIBRATIONS", "Unneeded", "remove", "unneeded"]

CALIBRATIONS = "calibrations"
"""Folder of ``qie_home()`` with what builds calibrated: files, and folders of those that were stopped."""

_CACHES = {
    "modulation": "modulation tables of edits",
    "encoder": "embeddings of images and instructions",
    "digests.json": "digests of checkpoints",
    "cache/tensorrt-rtx": "kernels compiled for this GPU",
    "cache/tensorrt": "kernels compiled for this GPU",
    "cache/onnxruntime": "kernels compiled for this GPU",
    "timing": "timings of kernels from builds",
}
"""Entry of ``qie_home()`` -> what it is. Each is made again when it is needed."""


_FINISHED, _STOPPED = ".npz", ".partial"

_CALIBRATIONS = {_FINISHED: "a calibration that a build made", _STOPPED: "left by a stopped calibration"}
"""Suffix of an entry of ``CALIBRATIONS`` -> what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unneeded:
    """A file or folder that may be deleted.

    Attributes:
        path: where it is.
        what: what it is, for people.
        bytes: size of its files.
    """

    path: Path
    what: str
    bytes: int


def unneeded(*, calibrations: bool = False) -> tuple[Unneeded, ...]:
    """What may be deleted: leftovers of builds and deletions that nobody uses any more, then caches.

    Finished calibrations, which may be the work of half an hour, are among it with ``calibrations`` alone.
    """
    folders = leftovers(bundles_folder())
    found = [(path, f"left by a stopped build or deletion of {_name_of(path)}") for path in folders]
    found += [
        (path, _CALIBRATIONS[path.suffix]) for path in _calibrations() if calibrations or path.suffix != _FINISHED
    ]
    found += [(qie_home() / name, what) for name, what in _CACHES.items() if (qie_home() / name).exists()]
    return tuple(Unneeded(path=path, what=what, bytes=size_of(path)) for path, what in found)


def remove(item: Unneeded) -> bool:
    """Delete ``item``; whether it is gone. A leftover that somebody began to use stays."""
    if item.path.parent == bundles_folder() or item.path.suffix == _STOPPED:
        return remove_leftover(item.path)
    if item.path.is_dir():
        shutil.rmtree(item.path, ignore_errors=True)
    else:
        item.path.unlink(missing_ok=True)
    return not item.path.exists()


def _calibrations() -> list[Path]:
    """The calibrations that builds keep, and what stopped ones left and nobody works on."""
    folder = qie_home() / CALIBRATIONS
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if path.suffix in _CALIBRATIONS and not (path.is_dir() and is_held(path))]


def _name_of(path: Path) -> str:
    return next(name for leftover, name, _ in leftovers_of(path.parent) if leftover == path)
