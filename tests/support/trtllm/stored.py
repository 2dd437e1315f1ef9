"""Tensors of a safetensors file: bfloat16 and float8 as numpy arrays, which the package for numpy does not give.

Format: 8 bytes of the header's length, a JSON header, the data (the README of safetensors).
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
BYTES = {dtype: code for code, dtype in DTYPES.items()}


def read_tensors(path: Path) -> dict[str, Array]:
    """Every tensor of the file."""
    return parse_tensors(path.read_bytes())


def parse_tensors(content: bytes) -> dict[str, Array]:
    """Every tensor of a file with this content."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name} has {end - start} bytes for {entry['dtype']} {entry['shape']}")
        tensors[name] = np.frombuffer(data[start:end], dtype).reshape(entry["shape"])
    return tensors


def write_tensors(path: Path, tensors: dict[str, Array]) -> None:
    """Write a file of ``tensors``, for checkpoints that a test makes or changes."""
    header, data, offset = {}, [], 0
    for name, tensor in tensors.items():
        content = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": BYTES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(content)],
        }
        data.append(content)
        offset += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
