"""Bundles on disk: find, open, verify and delete them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from qie.engines.bundle.manifest import MANIFEST, Manifest, read_manifest
from qie.engines.errors import BundleError
from qie.engines.files import qie_home, sha256_of
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "Bundle",
    "bundles",
    "bundles_folder",
    "is_bundle",
    "locate",
    "open_bundle",
    "remove_bundle",
    "verify",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder.
        manifest: its table of contents.
    """

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.manifest.files())


def bundles_folder() -> Path:
    """Where bundles live by name."""
    return qie_home() / "bundles"


def bundles() -> tuple[Path, ...]:
    """Folders of the bundles that have a name, newest first; they are not opened."""
    folders = [path.parent for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")]
    return tuple(sorted(folders, key=lambda path: (-(path / MANIFEST).stat().st_mtime, path.name)))


def is_bundle(path: Path) -> bool:
    """Whether qie may replace or delete the folder ``path``: it has the manifest of a bundle, or is a named bundle.

    Other programs write a manifest.json too; a bundle with a damaged manifest counts only where it has a name.
    """
    if not (path / MANIFEST).is_file():
        return False
    if path.resolve().parent == bundles_folder().resolve():
        return True
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(data, dict) and {"schema", "qie", "engines"} <= data.keys()


def open_bundle(name: str | Path | None = None) -> Bundle:
    """Open a bundle by name or folder; None is the newest one.

    The presence and size of every file are compared with the manifest; ``verify`` compares contents.

    Raises:
        BundleError: there is no such bundle, its manifest is unreadable, or a file is missing or has another size.
    """
    path = locate(name)
    bundle = Bundle(path=path, manifest=read_manifest(path))
    for record in bundle.manifest.files():
        file = path / record.path
        if not file.is_file():
            raise BundleError(f"bundle {path} lacks {record.path}; build it again with `qie build`")
        if file.stat().st_size != record.bytes:
            raise BundleError(
                f"{file} has {file.stat().st_size:,} bytes, expected {record.bytes:,}; "
                "build the bundle again with `qie build`"
            )
    return bundle


def verify(bundle: Bundle, *, progress: StageProgress = no_progress) -> None:
    """Compare the content of every file with its digest; ``progress`` is called with (bytes done, bytes in all).

    Raises:
        BundleError: the content of a file has changed.
    """
    done = 0
    for record in bundle.manifest.files():
        if sha256_of(bundle.path / record.path) != record.sha256:
            raise BundleError(f"{bundle.path / record.path} is damaged; build the bundle again with `qie build`")
        done += record.bytes
        progress(done, bundle.bytes)


def remove_bundle(path: Path) -> None:
    """Delete the bundle in the folder ``path``.

    Raises:
        BundleError: the folder is not a bundle.
    """
    if not is_bundle(path):
        raise BundleError(f"{path} was not built by qie and is not deleted; choose a bundle of `qie list`")
    (path / MANIFEST).unlink()  # first, so that a half-deleted bundle does not open
    shutil.rmtree(path)


def locate(name: str | Path | None) -> Path:
    """The folder of a bundle by name or folder; None is the newest one.

    Raises:
        BundleError: there is no such bundle.
    """
    if name is None:
        newest = next(iter(bundles()), None)
        if newest is None:
            raise BundleError(
                f"there is no bundle in {bundles_folder()}; build one with `qie build pocket --gpu cpu`, or name one",
                option="bundle",
            )
        return newest
    for path in (bundles_folder() / name, Path(name)):
        if (path / MANIFEST).is_file():
            return path
    names = ", ".join(path.name for path in bundles()) or "none"
    raise BundleError(
        f"there is no bundle {str(name)!r}, neither by name (available: {names}) nor as a folder; choose one of "
        "`qie list`",
        option="bundle",
    )
