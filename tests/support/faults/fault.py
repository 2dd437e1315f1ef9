"""A fault: how a sound bundle, or the code that builds or runs it, is broken in one place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qie.compiler.validation.report import Level
from tests.support.faults.code import Change

__all__ = ["Fault"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A sound bundle broken in one place.

    At least one of ``writes``, ``breaks``, ``runs`` and ``golden`` makes the fault.

    Attributes:
        how: what is wrong, for the table in docs/validation.md.
        level: up to which the bundle is checked.
        bundle: the sound bundle, a name in ``tests.support.faults.bundles.RECIPES``.
        writes: code that is changed while the bundle is built.
        breaks: changes a copy of the bundle.
        runs: code that is changed while the bundle runs.
        golden: makes another golden file from the model's own, in an empty folder.
    """

    how: str
    level: Level = "trajectory"
    bundle: str = "pocket"
    writes: Change | None = None
    breaks: Callable[[Path], object] | None = None
    runs: Change | None = None
    golden: Callable[[Path], Path] | None = None
