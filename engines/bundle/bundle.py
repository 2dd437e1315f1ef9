"""Bundles on disk: where they lie, how one is found and opened, and which of its engines fit this machine."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qie.engines.bundle.manifest import MANIFEST, Manifest, read_manifest
from qie.engines.errors import BundleError
from qie.engines.files import qie_home, sha256_of

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
    """An opened bundle."""

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
    """Folders of the bundles that have a name, newest first; whether they open is not checked."""
    found = [path.parent for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")]
    return tuple(sorted(found, key=lambda path: (-(path / MANIFEST).stat().st_mtime, path.name)))


def is_bundle(path: Path) -> bool:
    """Whether the folder ``path`` is qie's to replace or delete: a manifest says so, or it lies where bundles live.

    Other programs have a manifest.json too; a damaged bundle counts where it has a name.
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

    The manifest is read and every file's presence and size compared with it; ``verify`` reads contents.

    Raises:
        BundleError: there is no such bundle, its manifest is unreadable, or a file is missing or of another size.
    """
    path = locate(name)
    bundle = Bundle(path=path, manifest=read_manifest(path))
    for record in bundle.manifest.files():
        file = path / record.path
        if not file.is_file():
            raise BundleError(f"bundle {path} lacks {record.path}; build it again with `qie build`")
        if file.stat().st_size != record.bytes:
            raise BundleError(
                f"{file} has {file.stat().st_size:,} bytes, the manifest says {record.bytes:,}; "
                "build the bundle again with `qie build`"
            )
    return bundle


def verify(bundle: Bundle, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Compare the content of every file with its digest; ``progress`` is called with (bytes done, bytes).

    Raises:
        BundleError: a file's content is not what was built.
    """
    done = 0
    for record in bundle.manifest.files():
        if sha256_of(bundle.path / record.path) != record.sha256:
            raise BundleError(f"{bundle.path / record.path} is damaged; build the bundle again with `qie build`")
        done += record.bytes
        if progress is not None:
            progress(done, bundle.bytes)


def remove_bundle(path: Path) -> None:
    """Delete the bundle in the folder ``path``.

    Raises:
        BundleError: the folder is no bundle.
    """
    if not is_bundle(path):
        raise BundleError(f"{path} was not built by qie, so it is not deleted; `qie list` shows the bundles")
    (path / MANIFEST).unlink()  # first, so that what is half deleted does not open
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
