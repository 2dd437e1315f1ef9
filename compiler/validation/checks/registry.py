"""All checks of ``qie validate``, in the order of judgement; every gate of the recipe is read by one of them."""

from collections import Counter

from qie.compiler.recipe.gates import Gates, flat
from qie.compiler.validation.checks import components, determinism, drift, memory, quality, structure, trajectory
from qie.compiler.validation.checks.check import CheckSpec
from qie.compiler.validation.report import LEVELS

__all__ = ["CHECKS", "check_gates"]

CHECKS: tuple[CheckSpec, ...] = (
    *structure.SPECS,
    *components.SPECS,
    *trajectory.SPECS,
    *quality.SPECS,
    *drift.SPECS,
    *determinism.SPECS,
    *memory.SPECS,
)


def check_gates(checks: tuple[CheckSpec, ...]) -> None:
    """Check that each gate of a recipe is read by one check, and that no check reads another.

    Raises:
        AssertionError: a gate has no check or several, or a check names a gate that recipes do not have.
    """
    gates = flat(Gates())
    read = Counter(spec.gate for spec in checks if spec.gate is not None)
    assert read.keys() == gates.keys(), read.keys() ^ gates.keys()
    assert max(read.values()) == 1, read
    assert all(spec.gate is None or spec.gate.split(".")[1] == spec.level for spec in checks)
    order = [LEVELS.index(spec.level) for spec in checks]
    assert order == sorted(order)
