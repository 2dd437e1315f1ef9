"""A sound bundle passes however often it is checked, with any number of threads."""

from functools import partial
from pathlib import Path

import pytest

from qie.compiler.validation import subject
from qie.compiler.validation.run import Options, validate
from qie.engines.editing.stages import Stages
from tests.support.faults.findings import failures
from tests.support.soak import spread


@pytest.mark.parametrize("threads", spread(range(1, 11), 2))
def test_a_sound_bundle_passes_with_any_number_of_threads(
    pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(subject, "Stages", partial(Stages, threads=threads))
    report = validate(pocket_bundle, Options(level="trajectory"))
    assert (report.verdict, failures(report)) == ("passed", "")
