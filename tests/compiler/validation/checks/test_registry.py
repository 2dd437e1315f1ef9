"""The registry: every gate of a recipe is read by one check, and every check has a gate."""

from dataclasses import replace

import pytest

from qie.compiler.recipe.gates import Gates, flat
from qie.compiler.validation.checks.registry import CHECKS, check_gates


def test_gates_and_checks_belong_together() -> None:
    check_gates(CHECKS)
    assert sorted(spec.gate for spec in CHECKS if spec.gate is not None) == sorted(flat(Gates()))


def test_names_of_checks_are_unique_in_their_level() -> None:
    names = [(spec.level, spec.name) for spec in CHECKS]
    assert len(names) == len(set(names))


def test_a_gate_without_a_check_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"gates\.trajectory\.velocity"):
        check_gates(tuple(spec for spec in CHECKS if spec.name != "velocity"))


def test_a_check_without_its_gate_is_an_error() -> None:
    changed = tuple(replace(spec, gate="gates.edits.beauty") if spec.name == "psnr" else spec for spec in CHECKS)
    with pytest.raises(AssertionError, match=r"gates\.edits\.beauty"):
        check_gates(changed)


def test_two_checks_of_one_gate_are_an_error() -> None:
    velocity = next(spec for spec in CHECKS if spec.name == "velocity")
    with pytest.raises(AssertionError):
        check_gates((*CHECKS, velocity))
