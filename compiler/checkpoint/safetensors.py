"""Reads safetensors: every header is checked when a file is opened, every tensor is read into memory of its own.

The format is 8 bytes of header length (little-endian), a JSON header that maps a tensor's name to its dtype, shape and
byte range, and then the bytes of all tensors without gaps (safetensors, README.md, "Format").
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qie.engines.errors import CheckpointError, first_line

__all__ = [
    "STEMS",
    "SafetensorsReader",
    "TensorReader",
    "WrappedReader",
    "numpy_dtype",
    "open_file",
    "open_subfolder",
    "read_json",
    "weight_map",
]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name the weights of a subfolder."""

_DIGITS = 300
"""The most that a whole number in a config may have: floats end at 1.8e308."""

_LENGTH_BYTES = 8
_LONGEST_HEADER = 1 << 24
"""Bytes, for a hundred thousand tensors; a published shard has some hundred kB."""

_MOST_DIMS = 32
"""Dims that NumPy takes."""

_LONGEST_JSON = 1 << 26
"""Bytes of a config or an index."""

_READ = 1 << 24
"""Bytes that are read at once."""


class TensorReader(Protocol):
    """Tensors by name. Every method but ``names`` raises ``CheckpointError`` for a name that is missing."""

    def names(self) -> tuple[str, ...]:
        """All names, in no particular order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        ...

    def dtype(self, name: str) -> str:
        """The tensor's numpy dtype name, such as "bfloat16", without reading it."""
        ...

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor, which may be read-only."""
        ...

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """These names in the order in which their tensors lie in the files, each once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappedReader:
    """A reader with the tensors of another one; subclasses change what they need to."""

    reader: TensorReader

    def names(self) -> tuple[str, ...]:
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(name)

    def dtype(self, name: str) -> str:
        return self.reader.dtype(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        return self.reader.read(name)

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        return self.reader.order(names)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    file: Path
    state: tuple[int, ...]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetensorsReader:
    """The tensors of one file, or of all shards that an index names.

    Attributes:
        source: the file or index.
        files: every file that holds tensors.
        metadata: text that a single file carries beside its tensors.
        tensors: place of every tensor by its name.
    """

    source: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    tensors: Mapping[str, _Tensor] = field(repr=False)

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the files."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """The tensor's numpy dtype name, such as "bfloat16", without reading it."""
        return self._find(name).dtype.name

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor, read-only. It is read and not mapped: a disk that fails raises an error, and kills nothing.

        Raises:
            CheckpointError: there is no such tensor, the file cannot be read, or it is another one than when it was
                opened.
        """
        tensor = self._find(name)
        content = np.empty(tensor.length, np.uint8)
        if tensor.length:
            try:
                _read_into(content, tensor)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.file} cannot be read ({error.strerror}); download the checkpoint again"
                ) from error
        content.flags.writeable = False
        return content.view(tensor.dtype).reshape(tensor.shape)

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        """These names in the order in which their tensors lie in the files, each once.

        Raises:
            CheckpointError: there is no such tensor.
        """
        places = {name: self._find(name) for name in names}
        return tuple(sorted(places, key=lambda name: (places[name].file, places[name].offset, name)))

    def check_unchanged(self) -> None:
        """Compare the files with what they were when they were opened.

        Raises:
            CheckpointError: one was changed or replaced.
        """
        for tensor in {tensor.file: tensor for tensor in self.tensors.values()}.values():
            with tensor.file.open("rb") as file:
                if _state(file.fileno()) != tensor.state:
                    raise CheckpointError(f"{tensor.file} was changed while it was read; start again")

    def _find(self, name: str) -> _Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.source} has no tensor {name!r}; download the checkpoint again")
        return self.tensors[name]


def open_subfolder(folder: Path, canonical: Callable[[str], str] = str) -> SafetensorsReader:
    """Open the weights of a subfolder, sharded with an index or in a single file, and check all headers.

    ``canonical`` gives the name under which a stored tensor is known.

    Raises:
        CheckpointError: there are no weights, a shard is missing or cut short, a header is broken, a tensor that the
            index names is not in its shard, or two tensors get the same name.
    """
    for stem in STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return _open_shards(index, canonical)
        if single.is_file():
            return open_file(single, canonical)
    names = " or ".join(f"{stem}.safetensors[.index.json]" for stem in STEMS)
    raise CheckpointError(f"{folder} holds no weights, expected {names}; download the checkpoint again")


def open_file(path: Path, canonical: Callable[[str], str] = str) -> SafetensorsReader:
    """Open one safetensors file and check its header against its size.

    Raises:
        CheckpointError: the file is missing, cut short, or not a safetensors file.
    """
    stored, metadata = _read_header(path)
    tensors = _rename(path, stored, canonical)
    return SafetensorsReader(source=path, files=(path,), metadata=metadata, tensors=tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("a folder, pipe or device")
        if path.stat().st_size > _LONGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); download the checkpoint again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object; download it again")
    return content


def _whole(digits: str) -> int:
    """A whole number of JSON; one that is too large for any float is a mistake."""
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor, under the names of the file ``index``.

    Raises:
        CheckpointError: the file is not an index.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(shard, str) and 0 < len(shard) < 200 and Path(shard).name == shard and "\0" not in shard
        for shard in places.values()
    ):
        raise CheckpointError(f"{index} has no usable weight_map (tensor to shard file); download it again")
    return places


def numpy_dtype(path: str | Path, name: str, code: str) -> np.dtype[Any]:
    """The dtype that safetensors calls ``code``.

    Raises:
        CheckpointError: it is none that weights of a checkpoint have; ``path`` and ``name`` say which tensor has it.
    """
    if code not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {code}, expected one of {', '.join(_DTYPES)}; "
            "take the checkpoint's bfloat16 original"
        )
    return _DTYPES[code]


def _open_shards(index: Path, canonical: Callable[[str], str]) -> SafetensorsReader:
    places = weight_map(index)
    headers: dict[str, dict[str, _Tensor]] = {}
    for name, shard in places.items():
        if shard in headers:
            continue
        path = index.with_name(shard)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, {index.name} names it for {name!r} and others; download the checkpoint again"
            )
        headers[shard] = _read_header(path)[0]
    for name, shard in places.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{index.with_name(shard)} has no tensor {name!r}, though {index.name} says so, "
                "so shards and index are of different downloads; download the checkpoint again"
            )
    stored = {name: headers[shard][name] for name, shard in places.items()}
    tensors = _rename(index, stored, canonical)
    files = tuple(index.with_name(shard) for shard in sorted(headers))
    return SafetensorsReader(source=index, files=files, metadata={}, tensors=tensors)


def _rename(source: Path, stored: dict[str, _Tensor], canonical: Callable[[str], str]) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for name, tensor in stored.items():
        if canonical(name) in tensors:
            raise CheckpointError(f"{source} holds {canonical(name)!r} twice, under an old and a new prefix; keep one")
        tensors[canonical(name)] = tensor
    return tensors


def _read_header(path: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file, but a folder, pipe or device; name a safetensors file")
        with path.open("rb") as file:
            state, size = _state(file.fileno()), path.stat().st_size
            prefix = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else -1
            if not 2 <= length <= min(size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} is cut short or not a safetensors file ({size} bytes, header of {length}); "
                    "download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path or download it again"
        ) from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        base = _LENGTH_BYTES + length
        tensors = {name: _parse_entry(path, state, name, entry, base) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has a broken header ({first_line(error)}); download it again") from error
    end = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset != end:
            raise CheckpointError(f"{path} has a gap or an overlap at tensor {name!r}; download it again")
        end = tensor.offset + tensor.length
        if end > size:
            raise CheckpointError(
                f"{path} is cut short, tensor {name!r} ends at byte {end}, the file at {size}; download it again"
            )
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor; download it again")
    return tensors, metadata


def _read_into(content: npt.NDArray[np.uint8], tensor: _Tensor) -> None:
    """Read the bytes of ``tensor`` from the file that was opened before; what was read of another one is refused.

    Raises:
        CheckpointError: it is another file, was changed meanwhile, or is cut short.
        OSError: it cannot be read.
    """
    buffer = content.data
    with tensor.file.open("rb", buffering=0) as file:
        same = _state(file.fileno()) == tensor.state
        os.posix_fadvise(file.fileno(), tensor.offset, tensor.length, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while same and done < tensor.length:
            count = os.preadv(file.fileno(), [buffer[done : done + _READ]], tensor.offset + done)
            done += count
            same = count > 0
        if not same or _state(file.fileno()) != tensor.state:
            raise CheckpointError(f"{tensor.file} was changed while it was read; start again")


def _state(descriptor: int) -> tuple[int, ...]:
    """What tells whether an open file is still the one that was opened before."""
    stat = os.fstat(descriptor)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _parse_entry(path: Path, state: tuple[int, ...], name: str, entry: dict[str, Any], base: int) -> _Tensor:
    dtype, shape = numpy_dtype(path, name, entry["dtype"]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if len(shape) > _MOST_DIMS:
        raise ValueError(f"{name}: {len(shape)} dims")
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name}: shape {shape}, offsets {begin}, {end}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes for {dtype.name} {shape}")
    return _Tensor(file=path, state=state, dtype=dtype, shape=shape, offset=base + begin, length=end - begin)
