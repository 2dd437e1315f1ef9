"""The exceptions of qie: one tree, so that a caller can catch as much or as little as it needs.

                                                                                             exit code, HTTP status
    QieError                      the root; never raised itself                                      (2, 500)
    ├── RecipeError               a recipe is unknown, malformed or asks for what its GPU lacks      (2, 500)
    ├── CheckpointError           a checkpoint or LoRA is missing, incomplete or malformed           (2, 500)
    ├── CalibrationError          a calibration file is missing, damaged or of another model         (2, 500)
    ├── GoldenError               a golden file or its cases are missing, damaged or of another model (2, 500)
    ├── ExportError               a graph cannot be written for this checkpoint                      (2, 500)
    ├── BuildError                an engine or bundle cannot be built (compiler, disk, memory)       (2, 500)
    ├── BundleError               a bundle is missing, incomplete or damaged                         (2, 500)
    ├── EngineMismatchError       a bundle holds no engine that this machine can run                 (2, 503)
    ├── BackendMissingError       a required package is not installed                                (2, 503)
    ├── RequestError              an option or instruction of an edit cannot be used                 (2, 400)
    │   └── ImageError            an image or image file cannot be read, used or written             (2, 400)
    ├── EngineError               a backend failed or memory ran out while an engine ran             (2, 503)
    ├── BusyError                 too many edits wait, or the service ends                           (2, 429)
    ├── LateError                 an edit was not done within its time                               (2, 504)
    └── CancelledError            an edit was cancelled                                              (2, 503)

``RequestError`` is the caller's mistake, ``EngineError`` a limit of the machine. A contract that qie breaks is an
``AssertionError``, outside this tree.

A message is one sentence: what was found and what was expected, a semicolon, and the fix. It names no command-line
flag; ``option`` lets the command line add one. Exit codes: 0 done, 2 usage or environment.
"""

from typing import ClassVar

__all__ = [
    "BackendMissingError",
    "BuildError",
    "BundleError",
    "BusyError",
    "CalibrationError",
    "CancelledError",
    "CheckpointError",
    "EngineError",
    "EngineMismatchError",
    "ExportError",
    "GoldenError",
    "ImageError",
    "LateError",
    "QieError",
    "RecipeError",
    "RequestError",
    "first_line",
]


class QieError(Exception):
    """The root of the tree: an error whose text tells a person what to do.

    Attributes:
        option: name of the argument that caused the error or that fixes it, such as ``"size"`` or ``"out"``; None where
            there is none. It is a field of ``Request`` or an argument of the function that was called.
    """

    exit_code: ClassVar[int] = 2
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class RecipeError(QieError):
    """A recipe is unknown, malformed or asks for what its GPU lacks."""


class CheckpointError(QieError):
    """A checkpoint or LoRA is missing, incomplete or malformed."""


class CalibrationError(QieError):
    """A calibration file is missing, damaged or of another model."""


class GoldenError(QieError):
    """A golden file or its cases are missing, damaged or of another model."""


class ExportError(QieError):
    """A graph cannot be written for this checkpoint."""


class BuildError(QieError):
    """An engine or bundle cannot be built."""


class BundleError(QieError):
    """A bundle is missing, incomplete or damaged."""


class EngineMismatchError(QieError):
    """A bundle holds no engine that this machine can run."""

    http_status: ClassVar[int] = 503


class BackendMissingError(QieError):
    """A required package is not installed."""

    http_status: ClassVar[int] = 503


class RequestError(QieError):
    """An option or instruction of an edit cannot be used."""

    http_status: ClassVar[int] = 400


class ImageError(RequestError):
    """An image or image file cannot be read, used or written."""


class EngineError(QieError):
    """A backend failed or memory ran out while an engine ran."""

    http_status: ClassVar[int] = 503


class BusyError(QieError):
    """Too many edits wait, or the service ends."""

    http_status: ClassVar[int] = 429

    def __init__(self, message: str, *, retry_seconds: float = 1.0) -> None:
        """
        Args:
            message: for a person to read.
            retry_seconds: after which there may be room; an attribute too.
        """
        super().__init__(message)
        self.retry_seconds = retry_seconds


class LateError(QieError):
    """An edit was not done within its time."""

    http_status: ClassVar[int] = 504


class CancelledError(QieError):
    """An edit was cancelled."""

    http_status: ClassVar[int] = 503


def first_line(error: BaseException) -> str:
    """The first line of the text of ``error``; the name of its class where that is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
