"""How an engine compiler fails in a process of its own."""

import re
import signal

__all__ = ["OUT_OF_MEMORY", "SHOWN", "ending"]

OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|could not find any implementation|insufficient (memory|workspace)|requested size",
    re.IGNORECASE,
)
"""Messages of TensorRT when memory runs out, among them "could not find any implementation"."""

SHOWN = 3
"""Messages of a compiler in an error."""


def ending(code: int) -> str:
    """How a process with the return code ``code`` of ``subprocess`` ended."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
