"""The pieces of a bundle that is being built: each complete, verified when it is taken up again, kept until all are.

A piece is a folder named by its key, with its files as they are named in the bundle, and ``piece.json``, which is
written last: what the piece consists of, and the sha256 of that and of the key.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qie.engines.bundle.manifest import EngineRecord, FileRecord, GraphRecord, ModulationRecord
from qie.engines.files import replacing, sha256_of, sync
from qie.engines.folders import WORK_LOCK, remove_entry
from qie.engines.new_folders import resumed_folder
from qie.engines.progress import StageProgress, no_progress
from qie.engines.records import from_plain, to_plain

__all__ = ["Piece", "Pieces", "open_pieces"]

RECORD = "piece.json"
"""What a piece consists of."""

WORTH_KEEPING = 1 << 28
"""Bytes from which the pieces of a build that failed are kept; fewer are seconds of work."""

WORK = ".work"
"""Suffix of the folder of a piece that is not complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is built together.

    Attributes:
        engines: engines, with what describes them.
        graphs: what the machine with the GPU builds engines from.
        modulation: the modulation of the transformer.
        files: other files.
    """

    engines: tuple[EngineRecord, ...] = ()
    graphs: tuple[GraphRecord, ...] = ()
    modulation: ModulationRecord | None = None
    files: tuple[FileRecord, ...] = ()

    def records(self) -> tuple[FileRecord, ...]:
        """All its files, each once."""
        records = [*self.files]
        for engine in self.engines:
            records += [*engine.files, *([] if engine.structure is None else [engine.structure])]
        for graph in self.graphs:
            records += graph.files
        if self.modulation is not None and self.modulation.file is not None:
            records.append(self.modulation.file)
        return tuple({record.path: record for record in records}.values())


class Pieces:
    """The pieces in a folder that one process has (``open_pieces``).

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: set[str] = set()

    def retain(self, keys: Sequence[str]) -> None:
        """Delete the pieces with other keys."""
        self._drop(lambda entry: entry.name not in keys)

    def drop_incomplete(self) -> None:
        """Delete everything but complete pieces."""
        self._drop(lambda entry: not (entry / RECORD).is_file() or entry.suffix == WORK)

    def _drop(self, unwanted: Callable[[Path], bool]) -> None:
        for entry in self.folder.iterdir():
            if entry.name != WORK_LOCK and unwanted(entry):
                _delete(entry)

    def find(self, key: str, *, progress: StageProgress = no_progress) -> Piece | None:
        """The piece ``key``, whose files are compared with their digests; None where it is absent or damaged.

        Args:
            key: of the piece.
            progress: called with the bytes compared and the bytes in all.
        """
        place = self.folder / key
        piece = None if place.is_symlink() else _read(place / RECORD, key)
        if piece is None or not (key in self._whole or _is_whole(piece, place, progress)):
            _delete(place)
            return None
        self._whole.add(key)
        return piece

    def begin(self, key: str) -> Path:
        """An empty folder for the files of the piece ``key``, which ``keep`` completes."""
        work = self.folder / f"{key}{WORK}"
        _delete(work)
        work.mkdir()
        return work

    def keep(self, key: str, piece: Piece) -> None:
        """Complete the piece ``key``, whose files are in the folder of ``begin``, and flush it to the disk."""
        work = self.folder / f"{key}{WORK}"
        for record in piece.records():
            sync(work / record.path)
        content = {"piece": to_plain(piece), "sha256": _digest(key, piece)}
        with replacing(work / RECORD) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        work.rename(self.folder / key)
        sync(self.folder)
        self._whole.add(key)

    def place(self, key: str, piece: Piece, target: Path) -> None:
        """Give the files of ``piece`` names in the folder ``target``; where a disk has no second names, move them."""
        for record in piece.records():
            file, new = self.folder / key / record.path, target / record.path
            new.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, new)
            except FileExistsError:
                continue  # of another piece that shares it
            except OSError:
                file.rename(new)


@contextmanager
def open_pieces(destination: Path) -> Iterator[Pieces]:
    """The pieces of the bundle at ``destination``: deleted when the block succeeds, otherwise left to the next build.

    What is not complete is deleted in any case, and so is what is not worth keeping.
    """
    with resumed_folder(destination, worth=WORTH_KEEPING) as folder:
        pieces = Pieces(folder)
        pieces.drop_incomplete()
        try:
            yield pieces
        finally:
            pieces.drop_incomplete()


def _digest(key: str, piece: Piece) -> str:
    """sha256 of a piece's record and its key."""
    return hashlib.sha256(json.dumps([key, to_plain(piece)]).encode()).hexdigest()


def _read(record: Path, key: str) -> Piece | None:
    """The piece that ``record`` describes; None where it does not, or describes that of another key."""
    with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        content = json.loads(record.read_text(encoding="utf-8"))
        piece = from_plain(Piece, content["piece"])
        if content["sha256"] == _digest(key, piece):
            return piece
    return None


def _delete(entry: Path) -> None:
    """Delete a file, a link or a folder, as far as the system lets it."""
    with suppress(OSError):
        remove_entry(entry)


def _is_whole(piece: Piece, place: Path, progress: StageProgress) -> bool:
    records = piece.records()
    done, total = 0, sum(record.bytes for record in records)
    for record in records:
        file = place / record.path
        try:
            if os.path.realpath(file) != str(file.absolute()) or not file.is_file():
                return False  # a link may lead anywhere later
            if file.stat().st_size != record.bytes or sha256_of(file) != record.sha256:
                return False
        except OSError:
            return False
        done += record.bytes
        progress(done, total)
    return True
