"""Bundles on disk: find, open, verify and delete them."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qie.engines.bundle.manifest import MANIFEST, FileRecord, Manifest
from qie.engines.bundle.sealed import parse_manifest, read_manifest
from qie.engines.cache import encoder_cache_on_disk, tables_cache
from qie.engines.errors import BundleError
from qie.engines.files import is_leftover, qie_home, sha256_of
from qie.engines.folders import HeldFolder, remove_folder, restore_moved
from qie.engines.progress import StageProgress, no_progress

__all__ = [
    "Bundle",
    "bundles",
    "bundles_folder",
    "check_file",
    "foreign_files",
    "is_bundle",
    "locate",
    "open_bundle",
    "remove_bundle",
    "verify",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle, which stays what it is for as long as somebody has it.

    Attributes:
        path: its folder.
        manifest: its table of contents.
        folder: the folder held open. Every file is read through it, so that a build of the same name or ``qie rm``
            changes nothing for who has the bundle open.
    """

    path: Path
    manifest: Manifest
    folder: HeldFolder = field(repr=False, compare=False)

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
    restore_moved(bundles_folder())
    folders = {path.parent: _age(path) for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")}
    return tuple(sorted(folders, key=lambda path: (-folders[path], path.name)))


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


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
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "qie", "engines"} <= data.keys()


def foreign_files(path: Path) -> tuple[str, ...]:
    """Names of files in the folder of a bundle that are not the bundle's, and would be lost with it."""
    try:
        known = {record.path for record in read_manifest(path).files()} | {MANIFEST}
    except BundleError:  # whose files are not known
        return ()
    found = (file for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    return tuple(sorted(name for file in found if (name := file.relative_to(path).as_posix()) not in known))


def open_bundle(name: str | Path | None = None) -> Bundle:
    """Open a bundle by name or folder; None is the newest one.

    The manifest is compared with its digest, and every file with its size. The content of graphs, tokenizer and the
    description of engines is compared with their digests; ``verify`` compares that of the rest, the weights.

    Raises:
        BundleError: there is no such bundle, its manifest is unreadable or damaged, or a file is missing or damaged.
    """
    path = locate(name)
    try:
        folder = HeldFolder(path, MANIFEST)
    except OSError as problem:
        raise BundleError(
            f"{path} cannot be opened ({problem.strerror}); check its permissions or choose one of `qie list`"
        ) from None
    bundle = Bundle(path=path, manifest=parse_manifest(folder.lock, path / MANIFEST), folder=folder)
    for record in bundle.manifest.files():
        folder.read(lambda place, record=record: _check_size(place, record))  # type: ignore[misc]
    for record in _small_files(bundle.manifest):
        check_file(bundle, record)
    return bundle


def check_file(bundle: Bundle, record: FileRecord) -> None:
    """Compare the content of one file of ``bundle`` with its digest, once per opened bundle.

    Raises:
        BundleError: the content has changed.
    """
    if record.path in bundle.folder.verified:
        return
    try:
        digest = bundle.folder.read(lambda folder: sha256_of(folder / record.path))
    except OSError as problem:
        raise BundleError(f"{bundle.path / record.path} cannot be read ({problem.strerror}); {_AGAIN}") from None
    if digest != record.sha256:
        raise BundleError(f"{bundle.path / record.path} is damaged; {_AGAIN}")
    bundle.folder.verified.add(record.path)


def verify(bundle: Bundle, *, progress: StageProgress = no_progress) -> None:
    """Compare the content of every file with its digest; ``progress`` is called with (bytes done, bytes in all).

    Raises:
        BundleError: the content of a file has changed.
    """
    bundle.folder.verified.clear()
    done = 0
    for record in bundle.manifest.files():
        check_file(bundle, record)
        done += record.bytes
        progress(done, bundle.bytes)


def remove_bundle(path: Path) -> bool:
    """Delete the bundle in the folder ``path``, and the tables and embeddings that were cached for it.

    Its name is free at once. Where somebody has it open, its files are deleted when they close it. Of a link, the link
    and the folder are deleted.

    Returns:
        Whether its files are deleted already.

    Raises:
        BundleError: the folder is not a bundle.
    """
    if not is_bundle(path):
        raise BundleError(f"{path} was not built by qie and is not deleted; choose a bundle of `qie list`")
    foreign = foreign_files(path)
    if foreign:
        raise BundleError(f"{path} also holds {foreign[0]}, which is not the bundle's; move it away")
    with suppress(BundleError):  # a damaged bundle is deleted like any other
        manifest = read_manifest(path)
        tables_cache().drop(manifest.model.modulation.identity)
        for engine in manifest.engines:
            encoder_cache_on_disk().drop(engine.key)
    deleted = remove_folder(path.resolve())
    if path.is_symlink():
        path.unlink()
    return deleted


def _check_size(folder: Path, record: FileRecord) -> None:
    """Check that the file of ``record`` is in ``folder`` and has its size."""
    file = folder / record.path
    try:
        if not file.is_file() or not _is_inside(file.resolve(), folder.resolve()):
            raise BundleError(f"bundle {folder} lacks {record.path}; {_AGAIN}")
        size = file.stat().st_size
    except (OSError, RuntimeError):  # a loop of links, or a name that no file can have
        raise BundleError(f"bundle {folder} lacks {record.path}; {_AGAIN}") from None
    if size != record.bytes:
        raise BundleError(f"{file} has {size:,} bytes, expected {record.bytes:,}; {_AGAIN}")


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in ``folder``, or in the blobs of a download by huggingface_hub, to which its links point."""
    blobs = next((place.parent / "blobs" for place in folder.parents if place.name == "snapshots"), None)
    return folder in file.parents or (blobs is not None and file.parent == blobs)


def _is_small(path: str) -> bool:
    """Whether a file of an engine, or of what it is built from, is a graph, a config or code, and no weights."""
    return path.endswith((".onnx", ".json", ".py", ".sh"))


def _small_files(manifest: Manifest) -> list[FileRecord]:
    """What every opening reads: all but weights, compiled engines, tables and calibration."""
    files = [manifest.tokenizer, *(engine.structure for engine in manifest.engines if engine.structure is not None)]
    every = [*(engine.files for engine in manifest.engines), *(graph.files for graph in manifest.graphs)]
    return files + [record for records in every for record in records if _is_small(record.path)]


_AGAIN = "build the bundle again with `qie build`"


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
    for folder in (bundles_folder, Path):
        try:
            path = folder() / name
            restore_moved(path.parent, path.name)
            if (path / MANIFEST).is_file() and not is_leftover(path):
                return path
        except (OSError, ValueError):  # a name that no file can have
            continue
        except BundleError:  # there is no home, and none is needed for a path
            continue
    names = ", ".join(path.name for path in bundles()) or "none"
    raise BundleError(
        f"there is no bundle {str(name)!r}, neither by name (available: {names}) nor as a folder; choose one of "
        "`qie list`",
        option="bundle",
    )
