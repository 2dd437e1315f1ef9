"""Hub ids: their files in huggingface_hub's cache, and what is not there yet. What is cached works offline."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from qie.compiler.checkpoint.safetensors import numpy_dtype
from qie.compiler.checkpoint.shards import Shard, TensorFacts
from qie.engines.errors import CheckpointError, first_line
from qie.engines.files import is_disk_full, size_of
from qie.engines.progress import StageProgress

__all__ = ["HubShards", "fetch_configs", "fetch_weights", "missing_bytes"]

CONFIG_PATTERNS = ("model_index.json", "*/*.json", "*/*.txt", "*/*.jinja")
WEIGHT_PATTERNS = (
    "*/model.safetensors",
    "*/model-*.safetensors",
    "*/diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model-*.safetensors",
)
"""The files of a hub id that are downloaded; names with a variant, such as model.fp16.safetensors, are not."""

WATCH_SECONDS = 0.5
"""Time between two reports of a download."""


def fetch_configs(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id in the cache, named by its commit, with configs and tokenizer.

    Raises:
        CheckpointError: huggingface_hub is not installed, or the files are neither cached nor downloadable.
    """
    return _fetch(hub_id, revision, CONFIG_PATTERNS)


def fetch_weights(hub_id: str, commit: str, folder: Path, *, progress: StageProgress) -> None:
    """Download what ``folder``, a commit in the cache, lacks of its weights.

    ``progress`` is called with (bytes downloaded, bytes to download), from a thread of its own.

    Raises:
        CheckpointError: the weights are neither cached nor downloadable.
    """
    with _watched(folder.parents[1] / "blobs", missing_bytes(hub_id, commit, folder) or 0, progress):
        _fetch(hub_id, commit, WEIGHT_PATTERNS, cached=False)


def missing_bytes(hub_id: str, commit: str, folder: Path) -> int | None:
    """Bytes of weights that ``folder``, a commit in the cache, lacks; None where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(hub_id, revision=commit, files_metadata=True).siblings or []
    except Exception:  # whatever the network raised
        return None
    blobs = folder.parents[1] / "blobs"  # a file of an earlier commit is not downloaded again
    missing = 0
    for file in siblings:
        cached = (folder / file.rfilename).exists() or (file.lfs is not None and (blobs / file.lfs.sha256).exists())
        if not cached and any(fnmatch(file.rfilename, pattern) for pattern in WEIGHT_PATTERNS):
            missing += file.size or 0
    return missing


class HubShards:
    """The shards of a commit of a hub id, for ``qie.compiler.checkpoint.shards``."""

    def __init__(self, hub_id: str, commit: str) -> None:
        """Ask the hub for the files of the commit.

        Raises:
            CheckpointError: the hub does not answer.
        """
        from huggingface_hub import HfApi

        self._hub_id, self._commit = hub_id, commit
        self._headers: dict[str, dict[str, TensorFacts]] = {}
        try:
            siblings = HfApi().model_info(hub_id, revision=commit, files_metadata=True).siblings or []
        except Exception as problem:  # whatever the network raised
            raise CheckpointError(
                f"the hub does not list the files of {hub_id} ({first_line(problem)}); check the network, or give a "
                "folder"
            ) from problem
        self.shards = {
            file.rfilename: Shard(bytes=file.size or 0, sha256=file.lfs.sha256)
            for file in siblings
            if file.lfs is not None and any(fnmatch(file.rfilename, pattern) for pattern in WEIGHT_PATTERNS)
        }

    def tensors(self, path: str) -> Mapping[str, TensorFacts]:
        """The tensors of a shard in the order of its bytes, from its header, which is asked for once.

        Raises:
            CheckpointError: the hub does not answer, or a dtype is unknown.
        """
        from huggingface_hub import HfApi

        if path in self._headers:
            return self._headers[path]
        try:
            header = HfApi().parse_safetensors_file_metadata(self._hub_id, path, revision=self._commit)
        except Exception as problem:
            raise CheckpointError(
                f"the hub does not give the header of {path} ({first_line(problem)}); check the network, or give a "
                "folder"
            ) from problem
        in_order = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets[0])
        self._headers[path] = {
            name: TensorFacts(dtype=numpy_dtype(path, name, info.dtype).name, shape=tuple(info.shape))
            for name, info in in_order
        }
        return self._headers[path]

    def fetch(self, path: str, target: Path, *, progress: StageProgress) -> None:
        """Download a shard.

        Raises:
            CheckpointError: it cannot be downloaded.
            OSError: it cannot be written.
        """
        import huggingface_hub

        folder = target.parent / "download"
        with _watched(folder, self.shards[path].bytes, progress):
            try:
                file = huggingface_hub.hf_hub_download(self._hub_id, path, revision=self._commit, local_dir=folder)
            except Exception as problem:  # of the network or of the disk
                if isinstance(problem, OSError) and is_disk_full(problem):
                    raise
                raise CheckpointError(
                    f"{path} cannot be downloaded ({first_line(problem)}); check the network and start again"
                ) from problem
            Path(file).replace(target)


def _fetch(hub_id: str, revision: str | None, patterns: Sequence[str], *, cached: bool = True) -> Path:
    """The folder of a hub id in the cache, with the files that match ``patterns``.

    Where they cannot be downloaded, the ``cached`` files are taken; False where these are known to be incomplete.
    """
    try:
        import huggingface_hub
    except ImportError as problem:
        raise CheckpointError(
            f"{hub_id} is a hub id, and huggingface_hub is not installed ({problem}); run "
            "`pip install 'qie[compile]'` or give a folder"
        ) from None

    download = partial(huggingface_hub.snapshot_download, hub_id, revision=revision, allow_patterns=[*patterns])
    try:
        return Path(download())
    except Exception as error:  # whatever the network raised, the cache may hold the files
        with suppress(OSError, ValueError):
            if cached:
                return Path(download(local_files_only=True))
        command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
        reason = first_line(error)
        raise CheckpointError(
            f"{hub_id} is not complete in the cache and cannot be downloaded ({reason}); check the id and run "
            f"`{command}` where there is a network, or give a folder"
        ) from error


@contextmanager
def _watched(blobs: Path, total: int, progress: StageProgress) -> Iterator[None]:
    """Report how ``blobs`` grows while the block runs, in place of the bars that huggingface_hub draws."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before, done, drawn = size_of(blobs), threading.Event(), not are_progress_bars_disabled()

    failures: list[BaseException] = []

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            try:
                progress(min(size_of(blobs) - before, total), total)
            except BaseException as problem:  # the caller's own, for the caller's thread
                failures.append(problem)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if drawn:
        disable_progress_bars()
    if total:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if total:
            watcher.join()
        if drawn:
            enable_progress_bars()
    if failures:
        raise failures[0]
    if total:
        progress(total, total)
