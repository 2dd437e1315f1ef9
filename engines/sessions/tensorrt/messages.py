"""What TensorRT says: errors for the text of an exception, warnings for Python's ``logging``."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from qie.engines.errors import QieError, first_line

__all__ = ["messages_of", "raising"]

LOGGER = logging.getLogger("qie.tensorrt")


@contextmanager
def raising(error: Callable[[str], QieError]) -> Iterator[None]:
    """Raise ``error`` of what TensorRT's bindings raise in the block.

    They raise RuntimeError for a call that fails, TypeError for None where they take or make an object, and ValueError
    for dims without a rank (pyCore.cpp).
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as problem:
        raise error(first_line(problem)) from problem


@cache
def messages_of(trt: Any) -> Any:
    """The logger of the module ``trt``; TensorRT uses the first one of a process only.

    Attributes of what is returned: ``errors`` and ``warnings``, the latest of each. Warnings, such as "not graph
    capturable", also go to the logger ``qie.tensorrt`` at level INFO.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        """Keeps the latest errors and warnings."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=4)
            self.warnings: deque[str] = deque(maxlen=32)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(text.strip())
                LOGGER.info("%s", text.strip())

        def take(self) -> str:
            """The latest errors as text; they are then cleared."""
            text = ", ".join(self.errors)
            self.errors.clear()
            return text

    return Messages()
