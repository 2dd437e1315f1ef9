"""Writes a checkpoint of published sizes with made-up weights, with its shards or to make them on demand."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from qie.compiler.checkpoint.shards import Shard
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.configs import config_files
from qie.compiler.synthetic.layout import ShardFile, index_files
from qie.compiler.synthetic.shards import FILE, Recorded, shard_bytes, synthetic_json
from qie.engines.errors import CheckpointError
from qie.engines.files import existing, is_disk_full
from qie.engines.new_folders import replacing_folder
from qie.engines.progress import Progress, no_progress

__all__ = ["MOST_LAYERS", "SYNTHETIC", "Synthesis", "plan_synthesis", "synthesize"]

SYNTHETIC = {
    "2511": "qwen-image-edit-2511",
    "2509": "qwen-image-edit-2509",
    "edit": "qwen-image-edit",
    **{name: name for name in ARCHITECTURES if not name.startswith("qwen-image-edit")},
}
"""Name of a model -> its sizes in ``ARCHITECTURES``."""

MOST_LAYERS = 1000
"""Layers of a transformer or a language model at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Synthesis:
    """A checkpoint to be written.

    Attributes:
        folder: the folder to write.
        recorded: what decides the bytes of the shards.
        files: the shards.
        texts: configs, tokenizer and indices: path -> text.
        on_demand: whether shards are left to be made when they are needed.
        free_bytes: free on the disk of ``folder``.
    """

    folder: Path
    recorded: Recorded
    files: tuple[ShardFile, ...]
    texts: dict[str, str]
    on_demand: bool
    free_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.bytes for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """Bytes that are written."""
        texts = sum(len(text.encode()) for text in self.texts.values())
        return texts + (200 * len(self.files) if self.on_demand else self.weight_bytes)


def plan_synthesis(
    model: str,
    folder: Path,
    *,
    layers: int | None = None,
    language_layers: int | None = None,
    seed: int = 0,
    on_demand: bool = False,
    shard_bytes: int | None = None,
) -> Synthesis:
    """What ``synthesize`` will write; nothing is written here.

    Args:
        model: a key of ``SYNTHETIC``.
        folder: the folder to write; it must not exist, or be empty.
        layers: blocks of the transformer; None for the model's.
        language_layers: layers of the language model; None for the model's.
        seed: of the weights.
        on_demand: leave the shards to be made when they are needed.
        shard_bytes: the most bytes that a shard holds; None for as published.

    Raises:
        CheckpointError: the model is unknown, a number of layers is out of range, the folder is in use, or its disk
            is too small.
    """
    if model not in SYNTHETIC:
        raise CheckpointError(
            f"unknown model {model!r}, expected one of {', '.join(SYNTHETIC)}; choose one", option="model"
        )
    sizes = ARCHITECTURES[SYNTHETIC[model]]
    recorded = Recorded(
        architecture=SYNTHETIC[model],
        layers=sizes.num_layers if layers is None else layers,
        language_layers=sizes.text_layers if language_layers is None else language_layers,
        seed=seed,
        shard_bytes=shard_bytes,
    )
    for option, what, count in (
        ("layers", "transformer", recorded.layers),
        ("language_layers", "language model", recorded.language_layers),
    ):
        if not 1 <= count <= MOST_LAYERS:
            raise CheckpointError(
                f"the {what} has {count} layers, expected 1 to {MOST_LAYERS}; choose another number", option=option
            )
    _check_folder(folder)
    files = recorded.files()
    plan = Synthesis(
        folder=folder,
        recorded=recorded,
        files=files,
        texts={**config_files(recorded.sizes()), **index_files(files)},
        on_demand=on_demand,
        free_bytes=shutil.disk_usage(existing(folder)).free,
    )
    if plan.disk_bytes > plan.free_bytes:
        raise CheckpointError(
            f"the checkpoint needs {plan.disk_bytes:,} bytes, {existing(folder)} has {plan.free_bytes:,} free; "
            "free some space or choose a folder on another disk",
            option="out",
        )
    return plan


def synthesize(plan: Synthesis, *, progress: Progress = no_progress) -> Path:
    """Write a checkpoint, complete or not at all, in bounded memory.

    Args:
        plan: of ``plan_synthesis``.
        progress: called with (subfolder, bytes done, bytes in all).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder came into use meanwhile, it cannot be written, or the disk is full.
    """
    totals: Counter[Subfolder] = Counter()
    for file in plan.files:
        totals[file.subfolder] += file.bytes
    with _disk_errors(plan), replacing_folder(plan.folder) as folder:
        for path, text in plan.texts.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        done: dict[Subfolder, int] = {}
        shards: dict[str, Shard] = {}
        for file in plan.files:
            digest = hashlib.sha256()
            with nullcontext() if plan.on_demand else (folder / file.path).open("wb") as stream:
                for piece in shard_bytes(file, plan.recorded.seed):
                    if stream is None:
                        digest.update(piece)
                    else:
                        stream.write(piece)
                    done[file.subfolder] = done.get(file.subfolder, 0) + len(piece)
                    progress(file.subfolder, done[file.subfolder], totals[file.subfolder])
            shards[file.path] = Shard(bytes=file.bytes, sha256=digest.hexdigest())
        if plan.on_demand:
            (folder / FILE).write_text(synthetic_json(plan.recorded, shards), encoding="utf-8")
        _check_folder(plan.folder)  # what came meanwhile is not lost
    return plan.folder


@contextmanager
def _disk_errors(plan: Synthesis) -> Iterator[None]:
    """Say what to do where the folder of ``plan`` cannot be written."""
    try:
        yield
    except OSError as problem:
        if is_disk_full(problem):
            raise CheckpointError(
                f"the disk of {plan.folder} is full, the checkpoint needs {plan.disk_bytes:,} bytes; free some space "
                "or choose a folder on another disk",
                option="out",
            ) from problem
        raise CheckpointError(
            f"{plan.folder} cannot be written ({problem}); choose another folder", option="out"
        ) from problem


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not an empty folder; delete it or choose another one", option="out"
        )
