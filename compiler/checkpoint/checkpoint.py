"""A folder or hub id becomes a checkpoint: its configs, its tensors by name, and a digest of its content."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qie.compiler.checkpoint import hub
from qie.compiler.checkpoint.model import Model, parse_model
from qie.compiler.checkpoint.safetensors import SafetensorsReader, TensorReader, open_subfolder, read_json
from qie.compiler.checkpoint.scaled import scaled_reader
from qie.compiler.checkpoint.shards import Fetched, ShardSource, StreamedReader
from qie.compiler.checkpoint.subfolders import SUBFOLDERS, Subfolder
from qie.engines.errors import CheckpointError
from qie.engines.files import qie_home, replacing
from qie.engines.progress import StageProgress, no_progress
from qie.engines.records import brief

__all__ = ["ON_DEMAND", "POCKET", "Checkpoint", "digest_cache", "open_checkpoint"]

POCKET = Path(__file__).parents[2] / "recipes" / "pocket"
"""The small trained model that comes with qie."""

ON_DEMAND = "synthetic.json"
"""A file of a checkpoint without weights, whose shards are made one at a time (``qie.compiler.synthetic.shards``)."""

_CONFIGS = {
    "transformer": "transformer/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_PREPROCESSOR = "processor/preprocessor_config.json"
_TOKENIZER = tuple(
    f"{folder}/{name}"
    for folder in ("tokenizer", "processor")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_PATH = 4096
_CHUNK = 1 << 24
"""Bytes hashed between two reports of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A diffusers-format folder of Qwen-Image-Edit or a model of the same architecture.

    Attributes:
        path: the folder.
        name: the hub id, or the folder's name.
        revision: the hub's commit, None for a plain folder.
        complete: whether the weights are there and were checked; False where only configs and tokenizer were opened.
        model: what the configs say.
        fetched: the shard that is on the disk, where weights are fetched one shard at a time.
    """

    path: Path
    name: str
    revision: str | None
    complete: bool
    model: Model = field(repr=False)
    fetched: Fetched | None = field(default=None, repr=False, compare=False)

    def missing_bytes(self) -> int | None:
        """Bytes of weights that ``with_weights`` downloads; None where the hub does not answer."""
        if self.revision is None:
            return 0
        try:
            self.readers()
        except CheckpointError:
            return hub.missing_bytes(self.name, self.revision, self.path)
        return 0

    def with_weights(self, *, progress: StageProgress = no_progress) -> "Checkpoint":
        """The checkpoint with its weights, which are downloaded where the hub's cache lacks them.

        The weights are those of the commit of the configs. ``progress`` may be called from another thread.

        Raises:
            CheckpointError: the weights cannot be downloaded or are made on demand, or a file is missing, cut short or
                broken.
        """
        try:
            self.readers()
        except CheckpointError:
            if (self.path / ON_DEMAND).is_file():
                raise CheckpointError(
                    f"{self.path} has no weights, and they can be made one shard at a time, as a build that "
                    "streams does; synthesize the checkpoint with its weights"
                ) from None
            if self.revision is None:
                raise
            hub.fetch_weights(self.name, self.revision, self.path, progress=progress)
            self.readers()
        return replace(self, complete=True)

    def streamed(self, source: ShardSource, folder: Path, *, progress: StageProgress = no_progress) -> "Checkpoint":
        """The checkpoint with weights that are fetched from ``source`` into ``folder``, one shard at a time.

        Args:
            source: of the shards.
            folder: for one shard; it is deleted when another one is fetched, and by ``fetched.close``.
            progress: called with the bytes fetched and the bytes of all shards, while fetching.

        Raises:
            CheckpointError: the source does not answer, or lacks a shard.
        """
        checkpoint = replace(self, complete=True, fetched=Fetched(source, folder, progress=progress))
        checkpoint.readers()
        return checkpoint

    def reader(self, subfolder: Subfolder) -> SafetensorsReader:
        """The tensors of a subfolder under their canonical names; only headers are read here.

        Raises:
            CheckpointError: the weights are missing, incomplete or damaged.
        """
        return open_subfolder(self.path / subfolder, _canonical(subfolder))

    def readers(self) -> dict[Subfolder, TensorReader]:
        """The tensors of every subfolder, float8 weights with their scales applied; only headers are read here.

        Raises:
            CheckpointError: the weights are missing, incomplete or damaged, or a scale is of an unknown kind.
        """
        return {subfolder: scaled_reader(self._stored(subfolder)) for subfolder in SUBFOLDERS}

    def _stored(self, subfolder: Subfolder) -> SafetensorsReader | StreamedReader:
        if self.fetched is None:
            return self.reader(subfolder)
        return StreamedReader(self.fetched, self.path, subfolder, _canonical(subfolder))

    def check_layers(self) -> None:
        """Compare the numbers of layers in the configs with the weights, as far as these are here.

        Raises:
            CheckpointError: the weights have more or fewer.
        """
        counts: list[tuple[Subfolder, str, str, int]] = [
            ("transformer", "transformer_blocks", "num_layers", self.model.transformer.layers),
            ("text_encoder", "language_model.layers", "num_hidden_layers", self.model.language.layers),
            ("text_encoder", "visual.blocks", "vision_config.depth", self.model.vision.depth),
        ]
        for subfolder, prefix, key, expected in counts:
            try:
                names = self._stored(subfolder).names()
            except CheckpointError:  # not here yet, or damaged, which opening them says
                continue
            numbers = {
                name.removeprefix(f"{prefix}.").partition(".")[0] for name in names if name.startswith(f"{prefix}.")
            }
            if len(numbers) != expected:
                raise CheckpointError(
                    f"{subfolder}/config.json says {key} = {expected}, and the weights have {len(numbers)} of "
                    f"{prefix}; take both from one checkpoint"
                )

    def digest(self, *, cache: Path | None = None, progress: StageProgress = no_progress) -> str:
        """sha256 (hex) over the content of all configs, tokenizer files and, if ``complete``, weights.

        The same content has the same digest wherever it lies. In the hub's cache the name of a large file's blob is
        its sha256 already and is taken as such; other files are read. ``cache`` is a JSON file that keeps the
        sha256 of files whose path, size, times and inode have not changed.

        Raises:
            CheckpointError: the weights are missing, incomplete or damaged, or a file cannot be read.
        """
        names = ("model_index.json", *_CONFIGS.values(), _PREPROCESSOR, *_TOKENIZER)
        files = [self.path / name for name in names if (self.path / name).is_file()]
        known: dict[Path, str] = {}
        for subfolder in SUBFOLDERS if self.complete else ():
            reader = self._stored(subfolder)
            if isinstance(reader, StreamedReader):
                known |= reader.sha256
            files += sorted({reader.source, *reader.files})
        total = sum(file.stat().st_size for file in files if file not in known)
        remembered = _load_remembered(cache)
        whole = hashlib.sha256()
        done = 0
        for file in files:
            sha256 = (
                known.get(file) or _blob_sha256(file) or _remembered_sha256(file, remembered, done, total, progress)
            )
            whole.update(f"{file.relative_to(self.path).as_posix()}\0{sha256}\n".encode())
            done += 0 if file in known else file.stat().st_size
            progress(done, total)
        if cache is not None:
            _store_remembered(cache, remembered)
        return whole.hexdigest()


def digest_cache() -> Path:
    """The default ``cache`` of ``Checkpoint.digest``."""
    return qie_home() / "digests.json"


def open_checkpoint(source: str, *, revision: str | None = None, weights: bool = True) -> Checkpoint:
    """Open a checkpoint from a folder or from the hub, and check that nothing is missing before long work starts.

    Args:
        source: a folder in diffusers format; "pocket", the small trained model that comes with qie; or a hub id
            ("owner/name"), which is looked up through huggingface_hub and its cache; what is cached works offline.
        revision: branch, tag or commit of a hub id.
        weights: False opens configs and tokenizer alone, and downloads nothing else of a hub id.

    Raises:
        CheckpointError: there is no checkpoint, its pipeline is another one, a component or config is missing or
            damaged, components do not belong together, or (with ``weights``) a file of weights is missing, cut short
            or broken.
        ExportError: the model uses an option that the graphs do not express.
    """
    try:
        folder = Path(source).expanduser()
        folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # no user of that name, or no name that a file can have
        raise CheckpointError(f"{brief(source)} is no name of a folder ({error}); check it") from None
    if source == POCKET.name and not (folder / "model_index.json").is_file():
        folder = POCKET
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a folder and has no revision {revision!r}; leave the revision out")
        path, name = folder.absolute(), os.fsencode(folder.resolve().name).decode("utf-8", "replace")
    elif _HUB_ID.fullmatch(source):
        path, name = hub.fetch_configs(source, revision), source
        revision = path.name
    else:
        raise CheckpointError(
            f"there is no checkpoint {source!r}; name a folder, pocket, or a hub id such as Qwen/Qwen-Image-Edit-2511"
        )

    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise CheckpointError(f"{path} has no model_index.json; name a checkpoint, a folder in diffusers format")
    missing = [file for file in _CONFIGS.values() if not (path / file).is_file()]
    if not any((path / file).is_file() for file in _TOKENIZER if file.endswith(("tokenizer.json", "vocab.json"))):
        missing.append("tokenizer/tokenizer.json")
    if missing:
        raise CheckpointError(f"{path} is incomplete, it lacks {', '.join(missing)}; download the checkpoint again")
    configs = {name: read_json(path / file) for name, file in _CONFIGS.items()}
    for subfolder, config in configs.items():
        if config.get("quantization_config"):
            raise CheckpointError(
                f"{path / _CONFIGS[subfolder]} is the config of a quantized checkpoint, expected bfloat16 weights; "
                "take the original checkpoint"
            )
    preprocessor = path / _PREPROCESSOR
    model = parse_model(
        model_index=read_json(index_file),
        preprocessor=read_json(preprocessor) if preprocessor.is_file() else {},
        **configs,
    )
    checkpoint = Checkpoint(path=path, name=name, revision=revision, complete=False, model=model)
    return checkpoint.with_weights() if weights else checkpoint


def _canonical(subfolder: Subfolder) -> Callable[[str], str]:
    return _canonical_text_encoder if subfolder == "text_encoder" else str


def _canonical_text_encoder(name: str) -> str:
    """One name for old (``visual.``, ``model.``) and new (``model.visual.``, ``model.language_model.``) prefixes.

    transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py: Qwen2_5_VLModel holds ``visual`` and ``language_model``.
    """
    inner = name.removeprefix("model.")
    if inner == name or inner.startswith(("visual.", "language_model.")):
        return inner
    return f"language_model.{inner}"


def _blob_sha256(file: Path) -> str | None:
    """The sha256 in the name of a blob of the hub's cache, or None.

    snapshots/<commit>/…/file links to blobs/<name>; the name is a sha256 for large files and a git hash (40 digits)
    for others. Only this first link is followed: a blob may itself link to a store with names of another hash.
    """
    if not file.is_symlink():
        return None
    blob = Path(os.path.normpath(file.parent / file.readlink()))
    in_cache = blob.parent.name == "blobs" and blob.parent.with_name("snapshots") in file.parents
    return blob.name if in_cache and _SHA256.fullmatch(blob.name) else None


def _remembered_sha256(file: Path, remembered: dict[str, Any], done: int, total: int, progress: StageProgress) -> str:
    stat = file.stat()
    key = str(file.resolve())
    # the time of change cannot be set: files unpacked anew with fixed times may get the inodes of the old ones
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    match remembered.get(key):
        case {"state": seen, "sha256": str(sha256)} if seen == state and _SHA256.fullmatch(sha256):
            return sha256
    content = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
                done += len(chunk)
                progress(done, total)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); download the checkpoint again") from error
    remembered[key] = {"state": state, "sha256": content.hexdigest()}
    return content.hexdigest()


def _load_remembered(cache: Path | None) -> dict[str, Any]:
    """What the digest cache holds; a cache that is missing or damaged is empty."""
    if cache is None or not cache.is_file():
        return {}
    try:
        return read_json(cache)
    except CheckpointError:
        return {}


def _store_remembered(cache: Path, remembered: dict[str, Any]) -> None:
    """Write the digest cache atomically. Where that cannot be done, the next digest takes longer, nothing else."""
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary:
            merged = {**_load_remembered(cache), **remembered}
            kept = {name: entry for name, entry in merged.items() if len(name) < _LONGEST_PATH and Path(name).is_file()}
            temporary.write_text(json.dumps(kept), encoding="utf-8")
