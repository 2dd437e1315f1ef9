"""The dims of an engine's inputs and outputs, read from its bytes: an engine cannot be opened without its GPU.

The format is undocumented; this is what TensorRT for RTX 1.7.1 writes.
"""

import re
import struct

__all__ = ["io_dims"]

AFTER_NAME = b"\x1c\x80\x01\x00"
RANK = re.compile(rb"\x07\x80\x01\x00(.{4})\x01\x80\x09\x80\x01\x00(.{8})", re.DOTALL)
"""Behind dtype and strides: the rank, and the length of the array of dims that follows."""


def io_dims(engine: bytes, name: str) -> tuple[int, ...]:
    """The dims of the input or output ``name``; a negative number is a symbol, equal dims have the same."""
    text = name.encode()
    start = engine.index(struct.pack("<q", len(text)) + text + AFTER_NAME) + 8 + len(text)
    found = RANK.search(engine, start, start + 200)
    assert found is not None
    rank, count = int.from_bytes(found[1], "little"), int.from_bytes(found[2], "little")
    assert rank == count
    return struct.unpack_from(f"<{rank}q", engine, found.end())
