"""Which file of a checkpoint holds which tensor at which byte: as diffusers and transformers save a model.

Tensors are distributed over shards in the order of the model's ``state_dict`` (huggingface_hub,
``split_state_dict_into_shards_factory``), and lie in a shard in the order of their names (safetensors, ``prepare``).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import Architecture, Shape, tensor_shapes

__all__ = ["ShardFile", "StoredDType", "StoredTensor", "index_files", "published_shard_bytes", "shard_files"]

StoredDType = Literal["float32", "bfloat16", "float16"]

_STEMS: dict[Subfolder, str] = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}
_DTYPES: dict[StoredDType, tuple[str, int]] = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""Name in a header, and bytes of a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        stored: the name in the file.
        name: the canonical name (``Weight.name``), which decides the values.
        shape: PyTorch's.
        bytes: in the file.
    """

    stored: str
    name: str
    shape: Shape
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A safetensors file of a checkpoint.

    Attributes:
        path: relative to the checkpoint.
        subfolder: where it lies.
        tensors: in the order of the file.
        header: the bytes before the first tensor.
    """

    path: str
    subfolder: Subfolder
    tensors: tuple[StoredTensor, ...]
    header: bytes

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def published_shard_bytes(architecture: Architecture) -> Callable[[Subfolder], int]:
    """The most bytes that a shard of a subfolder holds, as published."""
    return lambda subfolder: (5 if subfolder == "text_encoder" else architecture.shard_gigabytes) * 10**9


def shard_files(
    architecture: Architecture, *, dtype: StoredDType, shard_bytes: Callable[[Subfolder], int | None]
) -> tuple[ShardFile, ...]:
    """Every file with weights of a checkpoint.

    Args:
        architecture: the sizes.
        dtype: of every tensor.
        shard_bytes: the most bytes that a shard of a subfolder holds, or a tensor alone; None for one file. The VAE
            has one file always.
    """
    files: list[ShardFile] = []
    for subfolder, shapes in tensor_shapes(architecture).items():
        tensors = {name: _stored(subfolder, name, shape, architecture, dtype) for name, shape in shapes.items()}
        limit = None if subfolder == "vae" else shard_bytes(subfolder)
        shards = _split({name: tensor.bytes for name, tensor in tensors.items()}, limit)
        for number, names in enumerate(shards, start=1):
            place = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
            inside = tuple(sorted((tensors[name] for name in names), key=lambda tensor: tensor.stored))
            path = f"{subfolder}/{_STEMS[subfolder]}{place}.safetensors"
            header = _header(inside, dtype)
            files.append(ShardFile(path=path, subfolder=subfolder, tensors=inside, header=header))
    return tuple(files)


def index_files(shards: Iterable[ShardFile]) -> dict[str, str]:
    """The index of every subfolder that has several shards: path -> text."""
    files: dict[str, list[ShardFile]] = {}
    for shard in shards:
        files.setdefault(f"{shard.subfolder}/{_STEMS[shard.subfolder]}.safetensors.index.json", []).append(shard)
    return {path: _index(parts) for path, parts in files.items() if len(parts) > 1}


def _index(shards: Iterable[ShardFile]) -> str:
    tensors = {tensor: shard.path.rpartition("/")[2] for shard in shards for tensor in shard.tensors}
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
        "weight_map": {tensor.stored: file for tensor, file in tensors.items()},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """The names in order, in lists whose sizes stay within ``limit``; a larger tensor is alone and closes no list."""
    shards: list[list[str]] = []
    shard: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if limit is not None and size > limit:
            shards.append([name])
            continue
        if limit is not None and filled + size > limit:
            shards.append(shard)
            shard, filled = [], 0
        shard.append(name)
        filled += size
    return [*shards, shard] if shard else shards


def _stored(
    subfolder: Subfolder, name: str, shape: Shape, architecture: Architecture, dtype: StoredDType
) -> StoredTensor:
    stored = name
    if subfolder == "text_encoder" and name != "lm_head.weight":
        new = architecture.text_names == "new"
        stored = f"model.{name}" if new else name.replace("language_model.", "model.", 1)
    return StoredTensor(stored=stored, name=name, shape=shape, bytes=_DTYPES[dtype][1] * math.prod(shape))


def _header(tensors: Iterable[StoredTensor], dtype: StoredDType) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.stored] = {"dtype": _DTYPES[dtype][0], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
