"""The shards of a synthetic checkpoint, made one at a time when they are needed: ``synthetic.json`` says what they are.

A shard that is made on demand has the bytes that it has in a folder that was written whole.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qie.compiler.checkpoint.checkpoint import ON_DEMAND
from qie.compiler.checkpoint.safetensors import read_json
from qie.compiler.checkpoint.shards import Shard, TensorFacts
from qie.compiler.synthetic.architecture import ARCHITECTURES, Architecture
from qie.compiler.synthetic.layout import ShardFile, published_shard_bytes, shard_files
from qie.compiler.synthetic.values import TensorValues
from qie.engines.errors import CheckpointError, first_line
from qie.engines.machine import cores
from qie.engines.progress import StageProgress, no_progress

__all__ = ["FILE", "Recorded", "SyntheticShards", "shard_bytes", "synthetic_json"]

FILE = ON_DEMAND
"""Name of the record in the checkpoint's folder."""

_FORMAT = 1
"""Changes with any byte of a shard."""

_MOST_WORKERS = 16
"""Threads at most, each with some 10 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What decides the bytes of every shard.

    Attributes:
        architecture: name of the sizes, a key of ``ARCHITECTURES``.
        layers: blocks of the transformer.
        language_layers: layers of the language model.
        seed: of the weights.
        shard_bytes: the most bytes that a shard holds; None for as published.
    """

    architecture: str
    layers: int
    language_layers: int
    seed: int
    shard_bytes: int | None = None

    def sizes(self) -> Architecture:
        """The architecture with these numbers of layers."""
        published = ARCHITECTURES[self.architecture]
        return replace(published, num_layers=self.layers, text_layers=self.language_layers)

    def files(self) -> tuple[ShardFile, ...]:
        """Every shard with its tensors."""
        sizes = self.sizes()
        limit = published_shard_bytes(sizes) if self.shard_bytes is None else lambda _: self.shard_bytes
        return shard_files(sizes, dtype="bfloat16", shard_bytes=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticShards:
    """The shards of a checkpoint that was written without them (``qie.compiler.checkpoint.shards.ShardSource``).

    Attributes:
        recorded: what decides their bytes.
        shards: by path relative to the checkpoint.
    """

    recorded: Recorded
    shards: Mapping[str, Shard]

    @classmethod
    def open(cls, folder: Path) -> "SyntheticShards | None":
        """The shards of the checkpoint in ``folder``; None where it is no checkpoint whose shards are made on demand.

        Raises:
            CheckpointError: the record is damaged, or of another version of qie.
        """
        path = folder / FILE
        if not path.exists():
            return None
        content = read_json(path)
        if content.get("format") != _FORMAT:
            raise CheckpointError(f"{path} was written by another version of qie; synthesize the checkpoint again")
        try:
            recorded = _recorded(content)
            shards = {name: Shard(bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in _entries(content)}
            if {name: shard.bytes for name, shard in shards.items()} != {f.path: f.bytes for f in recorded.files()}:
                raise ValueError("shards of other sizes")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({first_line(error)}); synthesize the checkpoint again"
            ) from error
        return cls(recorded=recorded, shards=shards)

    def tensors(self, path: str) -> dict[str, TensorFacts]:
        """The tensors of a shard in the order of its bytes, under the names that are stored in it.

        Raises:
            CheckpointError: there is no such shard.
        """
        return {t.stored: TensorFacts(dtype="bfloat16", shape=tuple(t.shape)) for t in self._file(path).tensors}

    def fetch(self, path: str, target: Path, *, progress: StageProgress = no_progress) -> None:
        """Make one shard and write it, from its first byte to its last; a failure leaves no file.

        Args:
            path: of the shard, a key of ``shards``.
            target: the file to write.
            progress: called with (bytes done, bytes in all).

        Raises:
            CheckpointError: there is no such shard.
            OSError: the file cannot be written.
        """
        file = self._file(path)
        done = 0
        try:
            with target.open("wb") as stream:
                for piece in shard_bytes(file, self.recorded.seed):
                    stream.write(piece)
                    done += len(piece)
                    progress(done, file.bytes)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def _file(self, path: str) -> ShardFile:
        file = next((file for file in self.recorded.files() if file.path == path), None)
        if file is None:
            raise CheckpointError(f"a synthetic checkpoint has no shard {path}; name one of {', '.join(self.shards)}")
        return file


def shard_bytes(file: ShardFile, seed: int) -> Iterator[bytes | memoryview]:
    """The bytes of a shard in order, in pieces of some MB that all cores make; few of them are in memory at a time."""
    yield file.header
    workers = min(cores(), _MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="synthetic")
    waiting: deque[Future[memoryview]] = deque()
    try:
        for tensor in file.tensors:
            values = TensorValues(subfolder=file.subfolder, name=tensor.name, shape=tensor.shape, seed=seed)
            for number in range(values.pieces):
                waiting.append(pool.submit(values.piece, number))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def synthetic_json(recorded: Recorded, shards: Mapping[str, Shard]) -> str:
    """The record of a checkpoint whose shards are made on demand."""
    content = {
        "format": _FORMAT,
        "architecture": recorded.architecture,
        "layers": recorded.layers,
        "language_layers": recorded.language_layers,
        "seed": recorded.seed,
        "dtype": "bfloat16",
        "shard_bytes": recorded.shard_bytes,
        "shards": {path: {"bytes": shard.bytes, "sha256": shard.sha256} for path, shard in shards.items()},
    }
    return json.dumps(content, indent=2) + "\n"


def _recorded(content: Mapping[str, Any]) -> Recorded:
    recorded = Recorded(
        architecture=content["architecture"],
        layers=content["layers"],
        language_layers=content["language_layers"],
        seed=content["seed"],
        shard_bytes=content["shard_bytes"],
    )
    numbers = (recorded.layers, recorded.language_layers, recorded.seed, recorded.shard_bytes or 1)
    if not all(type(number) is int for number in numbers) or max(recorded.layers, recorded.language_layers) > 1000:
        raise ValueError("numbers that no checkpoint has")
    return recorded


def _entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in content["shards"].items():
        if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str or len(entry["sha256"]) != 64:
            raise ValueError(f"shard {name}")
        yield name, entry
