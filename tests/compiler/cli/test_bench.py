"""``qie bench``: the table, the file, the verdict beside a baseline, and refusals before the work."""

import json
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.validation.timing import edits
from qie.compiler.validation.timing.edits import Workload
from qie.compiler.validation.timing.record import Timing
from tests.support.command_line import Qie, Refusal, assert_says
from tests.support.timings import steady, timing


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, ...]]:
    """The seconds of each stage that the next run finds; it runs no edit."""
    seconds = {"vision": steady(0.2), "denoise": steady(1.0)}

    def fake(work: Workload, *, warm_up: int, repeats: int, progress: Any) -> Timing:
        assert repeats == len(seconds["denoise"]), "the test gives as many times as are asked for"
        return timing(work.conditions, **seconds)

    monkeypatch.setattr(edits, "time_bundle", fake)
    return seconds


def test_it_prints_a_table_and_writes_a_baseline(
    qie: Qie, bundle: Path, workplace: Path, measured: dict[str, tuple[float, ...]]
) -> None:
    done = qie("bench", bundle, "--repeats", "6", "-o", "before.json")
    assert done.returncode == 0, done.stderr
    assert_says(done.stdout, r"stage +first +median +min +p90 +IQR")
    assert_says(done.stdout, r"denoise +1\.0 s +999 ms +995 ms")
    assert "baseline" not in done.stdout
    again = qie("bench", bundle, "--repeats", "6", "--baseline", "before.json")
    assert again.returncode == 0, again.stderr
    assert_says(again.stdout, r"denoise +999 ms +999 ms +1\.000 +0\.\d+ +within 5%")
    assert "no stage is slower than the baseline" in again.stdout


def test_a_slower_stage_exits_with_1(
    qie: Qie, bundle: Path, workplace: Path, measured: dict[str, tuple[float, ...]]
) -> None:
    words = ("bench", bundle, "--repeats", "6")
    qie(*words, "-o", "before.json")
    measured["denoise"] = steady(1.2)
    done = qie(*words, "--baseline", "before.json", "-o", "after.json")
    assert done.returncode == 1
    assert_says(done.stdout, r"vision .* within 5%")
    assert_says(done.stdout, r"denoise .* 1\.200 .* slower")
    assert "slower than the baseline: denoise, edit" in done.stdout
    assert Path("after.json").is_file()
    assert qie(*words, "--baseline", "before.json", "--tolerance", "30%").returncode == 0
    found = json.loads(qie(*words, "--baseline", "before.json", "--json").stdout)
    assert found["slower"] == ["denoise", "edit"]
    assert found["timing"] == json.loads(Path("after.json").read_text())


def test_a_stage_of_one_run_alone_is_in_table_and_json(
    qie: Qie, bundle: Path, workplace: Path, measured: dict[str, tuple[float, ...]]
) -> None:
    words = ("bench", bundle, "--repeats", "6")
    qie(*words, "-o", "before.json")
    del measured["vision"]
    measured["encode"] = (0.2,) * 6
    text = qie(*words, "--baseline", "before.json").stdout
    assert_says(text, r"vision +\d+ ms +- +- +- +only in the baseline")
    assert_says(text, r"encode +- +200 ms +- +- +not in the baseline")
    found = json.loads(qie(*words, "--baseline", "before.json", "--json").stdout)["baseline"]
    verdicts = {stage["stage"]: stage["verdict"] for stage in found}
    assert verdicts == {"denoise": "equal", "encode": "added", "vision": "removed", "edit": "equal"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tolerance", "5"), r"the tolerance is '5', expected a percentage; .* \(--tolerance\)"),
        (("--size", "wide"), "the size is 'wide'"),
        (("--baseline", "absent.json"), r"absent\.json cannot be read .* \(--baseline\)"),
        (("--baseline", "/dev/full"), r"/dev/full cannot be read .* a device\); .* \(--baseline\)"),
        (("--baseline", "photo.png"), r"photo\.png is no timing of this qie"),
        (("-o", "absent/x.json"), r"cannot be a file; .* \(-o|--out\)"),
        (("-o", "before.json", "--baseline", "before.json"), "is the baseline and would be lost"),
        (("--baseline", "before.json", "--steps", "7"), "the number of steps of the baseline is 20, and .* is 7"),
        (("--baseline", "before.json", "--repeats", "2"), r"6 edits of the baseline and 2 .* few .* \(--repeats\)"),
        (("--steps", "5000"), r"\(--steps\)"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_the_work(
    qie: Qie,
    refusal: Refusal,
    bundle: Path,
    workplace: Path,
    measured: dict[str, tuple[float, ...]],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    qie("bench", bundle, "--repeats", "6", "-o", "before.json")
    monkeypatch.setattr(edits, "time_bundle", None)
    assert_says(refusal(qie("bench", bundle, *words)), message)


def test_a_real_run_can_be_a_baseline(qie: Qie, bundle: Path, workplace: Path) -> None:
    """Of edits in this process; no time is asserted."""
    words = ("bench", bundle, "--steps", "1", "--cfg", "1", "--size", "64x64", "--warm-up", "0", "--repeats", "5")
    assert qie(*words, "-o", "before.json").returncode == 0
    done = qie(*words, "--baseline", "before.json", "--tolerance", "9999%")
    assert done.returncode == 0, done.stdout
    assert_says(done.stdout, "edits +1 first, 0 to warm up, 5 measured")
