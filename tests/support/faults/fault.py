"""A fault: how it is made, and which checks of ``qie validate`` must fail."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qie.compiler.validation.report import Level
from qie.engines.bundle.manifest import Component
from tests.support.faults.code import Change

__all__ = ["Fault", "Found"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What bisecting must name.

    Attributes:
        component: whose graph leaves the reference.
        block: the first block outside the gate; None where all blocks are within it.
        operation: the first operation outside the gate; None where every layer's output is within it.
    """

    component: Component
    block: str | None
    operation: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A sound bundle broken in one place.

    At least one of ``writes``, ``breaks``, ``runs`` and ``golden`` makes the fault.

    Attributes:
        how: what is wrong, for the table in docs/validation.md.
        checks: names of the checks that must fail; all others must not.
        cases: the golden cases that show it, where not all do.
        found: what bisecting must name; None where every operation is within its gate or nothing runs.
        level: up to which the bundle is checked.
        bundle: the sound bundle, a name in ``tests.support.faults.bundles.BUNDLES``.
        writes: code that is changed while the bundle is built.
        breaks: changes a copy of the bundle.
        runs: code that is changed while the bundle runs.
        golden: makes another golden file from the model's own, in an empty folder.
    """

    how: str
    checks: tuple[str, ...]
    cases: tuple[str, ...] = ()
    found: Found | None = None
    level: Level = "trajectory"
    bundle: str = "pocket"
    writes: Change | None = None
    breaks: Callable[[Path], object] | None = None
    runs: Change | None = None
    golden: Callable[[Path], Path] | None = None
