"""A checkpoint of the real architecture with random weights, in diffusers format and of any size.

It loads in diffusers and transformers like the published checkpoints, so every graph can be checked against them
without a download; its edits are noise.

Weights depend only on the seed and the tensor's name, and come from raw PCG64 bits, so equal arguments give equal
bytes. Their scales keep activations near 1 at any depth, and every parameter affects the output: norms are spread
around 1, biases are not zero, the temporal slices of a kernel differ.

The values are others than those of ``qie synthesize`` (``qie.compiler.synthetic.values``): what the parity tests have
recorded and their tolerances are of these, and they have no outliers, which float32 parity does not need.
"""

import hashlib
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import ARCHITECTURES, Architecture, Shape, tensor_shapes
from qie.compiler.synthetic.configs import config_files
from qie.compiler.synthetic.layout import StoredDType, index_files, shard_files
from qie.compiler.synthetic.scales import center_and_std
from qie.engines.errors import CheckpointError
from qie.engines.new_folders import replacing_folder

__all__ = ["ARCHITECTURES", "Architecture", "tensor_shapes", "write_checkpoint"]


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: StoredDType = "float32",
    weights: bool = True,
    shard_bytes: int | None = None,
    words: str = "",
) -> Path:
    """Write a diffusers checkpoint, complete or not at all; one tensor is in memory at a time.

    Args:
        folder: the folder to write; it must not exist, or be empty.
        architecture: the sizes.
        seed: seed of the weights.
        dtype: dtype of the weights.
        weights: False leaves out the safetensors files.
        shard_bytes: splits transformer and text encoder into shards of at most this size (or one tensor), with an
            index; None writes one file each.
        words: text that the vocabulary encodes in few tokens.

    Returns:
        ``folder``.

    Raises:
        CheckpointError: ``folder`` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; delete it or choose another one")
    with replacing_folder(folder) as partial:
        shards = shard_files(architecture, dtype=dtype, shard_bytes=lambda _: shard_bytes) if weights else ()
        for path, content in {**config_files(architecture, words), **index_files(shards)}.items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(content, encoding="utf-8")
        stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        for shard in shards:
            with (partial / shard.path).open("wb") as stream:
                stream.write(shard.header)
                for tensor in shard.tensors:
                    values = _values(shard.subfolder, tensor.name, tensor.shape, seed)
                    stream.write(values.astype(stored).tobytes())
    return folder


def _values(subfolder: Subfolder, name: str, shape: Shape, seed: int) -> NDArray[np.float32]:
    """One tensor: uniformly distributed, with center and standard deviation by the kind of parameter."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {subfolder} {name}".encode()).digest())
    count = math.prod(shape)
    bits = np.random.PCG64(key).random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]
    values = bits.astype(np.float32)
    values *= np.float32(2 * math.sqrt(3) / 2**32)
    values -= np.float32(math.sqrt(3))
    center, std = center_and_std(subfolder, name, shape)
    values *= np.float32(std)
    values += np.float32(center)
    return values.reshape(shape)
