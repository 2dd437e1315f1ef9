"""A checkpoint whose weights are not on the disk: one shard at a time is fetched, read and deleted.

The disk then holds what is made of the weights, and one shard. Whoever reads tensors in the order of ``order`` fetches
every shard once.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from qie.compiler.checkpoint.safetensors import STEMS, SafetensorsReader, open_file, weight_map
from qie.engines.errors import BuildError, CheckpointError
from qie.engines.files import is_disk_full, sha256_of
from qie.engines.progress import StageProgress

__all__ = ["Fetched", "Shard", "ShardSource", "StreamedReader", "TensorFacts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file of weights that can be fetched: its size in bytes, and its sha256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFacts:
    """A tensor in the header of a shard: its numpy dtype name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class ShardSource(Protocol):
    """Where shards come from."""

    @property
    def shards(self) -> Mapping[str, Shard]:
        """Every shard by its path in the checkpoint, such as ``vae/diffusion_pytorch_model.safetensors``."""
        ...

    def tensors(self, path: str) -> Mapping[str, TensorFacts]:
        """The tensors of a shard, under the names that are stored in it; the shard is not fetched.

        Raises:
            CheckpointError: the source does not answer.
        """
        ...

    def fetch(self, path: str, target: Path, *, progress: StageProgress) -> None:
        """Write the shard ``path`` to the file ``target``.

        Raises:
            CheckpointError: it cannot be fetched.
            OSError: it cannot be written.
        """
        ...


class Fetched:
    """The one shard of a checkpoint that is on the disk; safe between threads."""

    def __init__(self, source: ShardSource, folder: Path, *, progress: StageProgress) -> None:
        """Fetch from ``source`` into ``folder``, which is made.

        Args:
            source: of the shards.
            folder: for one shard.
            progress: called with the bytes fetched and the bytes of all shards, while fetching, in each pass over the
                shards: a pass ends where a shard comes again.
        """
        self.source = source
        self._folder, self._progress = folder, progress
        self._total = sum(shard.bytes for shard in source.shards.values())
        self._passed: set[str] = set()
        self._open: tuple[str, SafetensorsReader] | None = None
        self._lock = threading.Lock()

    def read(self, path: str, name: str) -> npt.NDArray[Any]:
        """The tensor ``name``, as it is stored, of the shard ``path``; another shard is deleted first.

        Raises:
            CheckpointError: the shard cannot be fetched, or is another one than its source says.
            BuildError: the disk is full, or cannot be written.
        """
        with self._lock:
            if self._open is None or self._open[0] != path:
                self._drop()
                self._open = (path, self._fetch(path))
            return self._open[1].read(name)

    def close(self) -> None:
        """Delete what is on the disk."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        self._open = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fetch(self, path: str) -> SafetensorsReader:
        shard = self.source.shards[path]
        target = self._folder / Path(path).name
        if path in self._passed:
            self._passed.clear()
        before = sum(self.source.shards[passed].bytes for passed in self._passed)

        def progress(done: int, total: int) -> None:
            self._progress(min(before + done, self._total), self._total)

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if shard.bytes > free:
                raise BuildError(
                    f"{path} has {shard.bytes:,} bytes, and {free:,} are free in {self._folder.parent}; free some "
                    "space or build on another disk",
                    option="out",
                )
            self.source.fetch(path, target, progress=progress)
            found = sha256_of(target)
        except OSError as problem:
            if is_disk_full(problem):
                raise BuildError(
                    f"the disk of {self._folder} is full, {path} has {shard.bytes:,} bytes; free some space or build "
                    "on another disk",
                    option="out",
                ) from problem
            raise BuildError(
                f"{target} cannot be written ({problem}); choose another folder", option="out"
            ) from problem
        if found != shard.sha256:
            raise CheckpointError(f"{path} has the sha256 {found[:12]}, expected {shard.sha256[:12]}; start again")
        self._passed.add(path)
        progress(shard.bytes, shard.bytes)
        return open_file(target)


class StreamedReader:
    """The tensors of one subfolder of such a checkpoint, under canonical names.

    Attributes:
        source: the index, or the only shard.
        files: every shard, where it would lie.
        sha256: of each of these.
    """

    def __init__(self, fetched: Fetched, root: Path, subfolder: str, canonical: Callable[[str], str]) -> None:
        """Read names and shapes; no shard is fetched.

        Args:
            fetched: the shard on the disk.
            root: folder of the configs and indices.
            subfolder: of ``root``.
            canonical: gives the name under which a stored tensor is known.

        Raises:
            CheckpointError: the source does not answer, or has no weights for the subfolder.
        """
        self._fetched = fetched
        source = fetched.source
        index, files = _files(root / subfolder, subfolder, source.shards)
        self._places: dict[str, tuple[str, str]] = {}
        self._facts: dict[str, TensorFacts] = {}
        for path in sorted(files):
            if path not in source.shards:
                raise CheckpointError(f"{path} is in the index, and not where the weights come from; check the model")
            header, listed = source.tensors(path), files[path]
            for stored in listed - header.keys():
                raise CheckpointError(f"{path} has no tensor {stored!r}, though its index says so; check the model")
            for stored in (stored for stored in header if stored in listed or not listed):
                name = canonical(stored)
                if name in self._places:
                    raise CheckpointError(f"{subfolder} holds {name!r} twice, under an old and a new prefix; keep one")
                self._places[name], self._facts[name] = (path, stored), header[stored]
        self.sha256 = {root / path: source.shards[path].sha256 for path in sorted(files)}
        self.files = tuple(self.sha256)
        self.source = index if index.is_file() else self.files[0]

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the files."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without fetching it."""
        return self._known(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's numpy dtype name, without fetching it."""
        return self._known(name).dtype

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor.

        Raises:
            CheckpointError, BuildError: see ``Fetched.read``; or the shard holds another tensor than its source says.
        """
        facts = self._known(name)
        path, stored = self._places[name]
        tensor = self._fetched.read(path, stored)
        if (tensor.dtype.name, tensor.shape) != (facts.dtype, facts.shape):
            raise CheckpointError(
                f"{path} has {stored!r} as {tensor.dtype.name} {list(tensor.shape)}, expected {facts.dtype} "
                f"{list(facts.shape)}; start again"
            )
        return tensor

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """These names in the order in which their tensors lie in the files, each once.

        Raises:
            CheckpointError: there is no such tensor.
        """
        wanted = frozenset(names)
        for name in wanted:
            self._known(name)
        return tuple(name for name in self._places if name in wanted)

    def _known(self, name: str) -> TensorFacts:
        if name not in self._facts:
            raise CheckpointError(f"the weights have no tensor {name!r}; download the checkpoint again")
        return self._facts[name]


def _files(folder: Path, subfolder: str, shards: Mapping[str, Shard]) -> tuple[Path, dict[str, set[str]]]:
    """The index of a subfolder, and its shards -> the tensors that the index lists; none where there is no index."""
    for stem in STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", f"{subfolder}/{stem}.safetensors"
        if index.is_file():
            files: dict[str, set[str]] = {}
            for name, file in weight_map(index).items():
                files.setdefault(f"{subfolder}/{file}", set()).add(name)
            return index, files
        if single in shards:
            return index, {single: set()}
    raise CheckpointError(f"{folder} has no index of weights, and no single file of them; check the model")
