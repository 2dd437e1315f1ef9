"""Writes the text encoder as transformers stores it: one safetensors file, a tensor at a time, and the small files."""

import errno
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qie.compiler.backends.vllm.config import SCRIPT, SMALL_FILES, files
from qie.compiler.backends.vllm.settings import Settings
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.weights.placed_file import disk_error
from qie.compiler.weights.prepare import check_weights, pieces
from qie.compiler.weights.weight import Weight
from qie.compiler.weights.weights_file import CHUNK_BYTES
from qie.engines.files import replacing
from qie.engines.progress import StageProgress, no_progress

__all__ = ["FILES", "WEIGHTS_FILE", "text_encoder_bytes", "write_text_encoder"]

WEIGHTS_FILE = "model.safetensors"

FILES = (WEIGHTS_FILE, *SMALL_FILES)
"""Everything that ``write_text_encoder`` writes, in that order."""

_CODES = {"float32": "F32", "bfloat16": "BF16"}
"""dtype -> its name in a safetensors header."""


def text_encoder_bytes(weights: Sequence[Weight], dtype: str) -> int:
    """Size of the tensors from which ``weights`` of a graph are made, stored in ``dtype``."""
    size = np.dtype(dtype).itemsize
    return sum(size * math.prod(weight.shape) for weight in _by_source(weights).values())


def write_text_encoder(
    settings: Settings,
    reader: TensorReader,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    progress: StageProgress = no_progress,
) -> tuple[str, ...]:
    """Write everything that vLLM reads of a text encoder into ``folder``.

    Names, shapes and dtypes are checked before the first byte is written. Tensors have the names of transformers 5,
    which are the canonical ones behind ``model.``; there is no language head.

    Args:
        settings: the model and how it is stored.
        reader: tensors of the text encoder under canonical names.
        tokenizer: of the checkpoint.
        folder: an existing folder.
        progress: called with the bytes done and the bytes in all.

    Returns:
        ``FILES``.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating-point or finite.
        BuildError: the disk is full or a file cannot be written.
    """
    check_weights(settings.weights, {"text_encoder": reader})
    small = files(settings, tokenizer)
    path = folder / WEIGHTS_FILE
    names = list(_by_source(settings.weights))
    header, total = _header(names, reader, settings.dtype)
    try:
        if total > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replacing(path) as temporary, temporary.open("wb") as file:
            done = file.write(header)
            for name in names:
                shape = reader.shape(name)
                stored = Weight(name=name, subfolder="text_encoder", shape=shape, dtype=settings.dtype)
                for piece in pieces(stored, reader.read(name), most=CHUNK_BYTES):
                    done += file.write(piece.data)
                    progress(done, total)
            assert done == total, f"{done} of {total} bytes written"
        for name, text in small.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / SCRIPT).chmod(0o755)
    except OSError as error:
        raise disk_error(error, path, total) from error
    return FILES


def _by_source(weights: Sequence[Weight]) -> dict[str, Weight]:
    """The tensors of the checkpoint that ``weights`` are made from, each once."""
    return {weight.source: weight for weight in weights}


def _header(names: Sequence[str], reader: TensorReader, dtype: str) -> tuple[bytes, int]:
    """The first bytes of the file, and the size of the whole."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = reader.shape(name)
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[f"model.{name}"] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end
