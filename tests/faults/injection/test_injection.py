"""Every fault is found: by the checks that should, by no others, and bisecting names its block and its operation."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qie.compiler.validation.run import Options, validate
from qie.engines.bundle.specs import SchedulerSpec
from qie.engines.inputs.schedule import sigmas
from tests.support.faults.bundles import RECIPES
from tests.support.faults.catalogue import FAULTS, inject
from tests.support.faults.code import Change, changed
from tests.support.faults.expected import EXPECTED
from tests.support.faults.findings import failures, outside
from tests.support.soak import spread

Sound = Callable[[str], Path]


@pytest.mark.parametrize("name", RECIPES)
def test_a_sound_bundle_passes(sound: Sound, name: str) -> None:
    report = validate(sound(name), Options(level="trajectory", bisect=True))
    assert (report.verdict, failures(report), outside(report)) == ("passed", "", "")


def test_every_fault_has_an_expectation() -> None:
    assert list(EXPECTED) == list(FAULTS)
    assert all(checks for checks, _ in EXPECTED.values())


@pytest.mark.parametrize("name", spread([name for name in FAULTS if FAULTS[name].level != "edits"], 18))
def test_a_fault_is_found(sound: Sound, tmp_path: Path, name: str) -> None:
    report = inject(FAULTS[name], sound, tmp_path)
    assert report.verdict == "failed"
    assert (failures(report), outside(report)) == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", spread([name for name in FAULTS if FAULTS[name].level == "edits"], 1))
def test_a_fault_of_a_whole_edit_is_found(sound: Sound, tmp_path: Path, name: str) -> None:
    report = inject(FAULTS[name], sound, tmp_path)
    assert report.verdict == "failed"
    assert (failures(report), outside(report)) == EXPECTED[name]


def test_changed_code_is_what_it_was_afterwards() -> None:
    def last() -> float:
        return float(sigmas(SchedulerSpec(), steps=4, noise_tokens=64)[3])

    change = Change(module="engines.inputs.schedule", old="np.linspace(1.0, 1.0 / steps", new="np.linspace(1.0, 0.5")
    with changed(change):
        assert last() == 0.5
    assert last() == 0.25


def test_a_change_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(AssertionError), changed(Change(module="engines.inputs.schedule", old="no such", new="line")):
        pass
