"""The exceptions of qie: one tree, so that a caller can catch as much or as little as it wants.

    QieError                      everything below; never raised itself
    ├── RecipeError               a recipe is unknown, malformed, or asks for what its target lacks
    ├── CheckpointError           a checkpoint or LoRA is missing, incomplete, truncated or of another shape
    ├── CalibrationError          a calibration file is missing, damaged, or of another model
    ├── ExportError               a graph cannot be written for this checkpoint
    ├── BuildError                an engine or bundle cannot be made (compiler, disk, memory)
    ├── BundleError               a bundle is missing, incomplete or damaged
    ├── EngineMismatchError       a bundle holds no engine that fits this machine
    ├── BackendMissingError       a package that the wish needs is not installed
    ├── ValidationError           a gate of the recipe was not met            (exit code 1)
    └── EditError                 an image, instruction or option of an edit cannot be used

A message says what was found, what was expected, and the command or edit that mends it, in one sentence or two.
Exit codes: 0 done, 1 validation failed, 2 usage or environment.
"""

from typing import ClassVar

__all__ = [
    "BackendMissingError",
    "BuildError",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "EditError",
    "EngineMismatchError",
    "ExportError",
    "QieError",
    "RecipeError",
    "ValidationError",
]


class QieError(Exception):
    """The root of the tree: an error whose text tells a person what to do."""

    exit_code: ClassVar[int] = 2


class RecipeError(QieError):
    """A recipe is unknown, malformed, or asks for what its target lacks."""


class CheckpointError(QieError):
    """A checkpoint or LoRA is missing, incomplete, truncated or of another shape."""


class CalibrationError(QieError):
    """A calibration file is missing, damaged, or of another model."""


class ExportError(QieError):
    """A graph cannot be written for this checkpoint."""


class BuildError(QieError):
    """An engine or bundle cannot be made."""


class BundleError(QieError):
    """A bundle is missing, incomplete or damaged."""


class EngineMismatchError(QieError):
    """A bundle holds no engine that fits this machine."""


class BackendMissingError(QieError):
    """A package that the wish needs is not installed."""


class ValidationError(QieError):
    """A gate of the recipe was not met."""

    exit_code: ClassVar[int] = 1


class EditError(QieError):
    """An image, instruction or option of an edit cannot be used."""
