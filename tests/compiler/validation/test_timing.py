"""Timings: what is measured, the figures of a stage, and verdicts beside a baseline."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.validation.timing.baseline import check_baseline, compare_timings, read_timing
from qie.compiler.validation.timing.edits import time_bundle, time_edits, workload
from qie.compiler.validation.timing.record import StageTime
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.specs import Size
from qie.engines.errors import EngineMismatchError, RequestError
from qie.engines.records import to_plain
from tests.support.command_line import assert_says
from tests.support.timings import CONDITIONS, steady, timing


def test_the_first_edit_is_apart_and_warm_up_does_not_count() -> None:
    now, calls, reports = [0.0], count(1), []

    def edit() -> Mapping[str, float]:
        """The call N takes N seconds, half of them in the stage denoise; the first one loads for 100."""
        number = next(calls)
        now[0] += number + (100 if number == 1 else 0)
        return {"denoise": number / 2}

    stages = time_edits(edit, warm_up=2, repeats=3, clock=lambda: now[0], progress=lambda *call: reports.append(call))
    assert [(s.stage, s.first, s.seconds) for s in stages] == [
        ("denoise", 0.5, (2.0, 2.5, 3.0)),
        ("other", 100.5, (2.0, 2.5, 3.0)),
        ("edit", 101.0, (4.0, 5.0, 6.0)),
    ]
    assert reports == [(n, 6) for n in range(7)]


def test_a_stage_that_only_some_edits_have_takes_no_time_in_the_others() -> None:
    calls = count()
    stages = time_edits(lambda: {"modulation": 1.0} if next(calls) == 0 else {"vision": 2.0}, warm_up=0, repeats=2,
                        clock=count().__next__)  # fmt: skip
    assert {s.stage: (s.first, s.seconds) for s in stages if s.stage in ("modulation", "vision")} == {
        "modulation": (1.0, (0.0, 0.0)),
        "vision": (0.0, (2.0, 2.0)),
    }


def test_the_figures_of_a_stage() -> None:
    stage = StageTime(stage="x", first=9.0, seconds=(5.0, 1.0, 3.0, 2.0, 4.0))
    assert (stage.median, stage.least, stage.spread) == (3.0, 1.0, 2.0)
    assert stage.p90 == pytest.approx(4.6)
    single = StageTime(stage="x", first=9.0, seconds=(5.0,))
    assert (single.median, single.least, single.p90, single.spread) == (5.0, 5.0, 5.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        (steady(1.0), "equal"),
        (steady(1.04), "equal"),  # beyond noise, within the tolerance
        (steady(1.2), "slower"),
        (steady(0.8), "faster"),
        (steady(1.2, jitter=1.5), "noise"),  # beyond the tolerance
        ((1.0,) * 6, "equal"),
        ((1.2,) * 6, "slower"),
    ],
)
def test_a_stage_is_slower_beyond_tolerance_and_noise(seconds: tuple[float, ...], verdict: str) -> None:
    stage, whole = compare_timings(timing(denoise=steady(1.0)), timing(denoise=seconds), 0.05)
    assert (stage.stage, stage.verdict) == ("denoise", verdict)
    assert stage.new is not None and stage.old is not None
    assert stage.ratio == pytest.approx(stage.new / stage.old)
    assert whole.verdict == verdict  # it is the only stage


def test_equal_times_are_no_evidence() -> None:
    stage, _ = compare_timings(timing(denoise=(1.0,) * 6), timing(denoise=(1.0,) * 6), 0.0)
    assert (stage.p, stage.verdict) == (1.0, "equal")


def test_a_stage_that_hardly_counts_is_not_judged() -> None:
    old = timing(denoise=steady(1.0), modulation=steady(0.001))
    new = timing(denoise=steady(1.0), modulation=steady(0.005))
    verdicts = {v.stage: v.verdict for v in compare_timings(old, new, 0.05)}
    assert verdicts == {"denoise": "equal", "modulation": "short", "edit": "equal"}


def test_a_stage_that_only_one_of_the_runs_has_is_listed() -> None:
    old = timing(denoise=steady(1.0), vision=(0.25,) * 6)
    new = timing(denoise=steady(1.0), upscale=(0.75,) * 6)
    denoise, added, removed, whole = compare_timings(old, new, 0.05)
    assert (denoise.stage, denoise.verdict) == ("denoise", "equal")
    assert (added.stage, added.verdict, added.old, added.new) == ("upscale", "added", None, 0.75)
    assert (removed.stage, removed.verdict, removed.old, removed.new) == ("vision", "removed", 0.25, None)
    assert (added.ratio, added.p, removed.ratio, removed.p) == (None, None, None, None)
    assert (whole.stage, whole.verdict) == ("edit", "slower")


def test_a_baseline_is_a_regular_file(tmp_path: Path) -> None:
    """Nothing is written to the pipe, which would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/full"), tmp_path):
        with pytest.raises(RequestError, match="cannot be read .it is a folder, a pipe or a device.; check") as refused:
            read_timing(path)
        assert refused.value.option == "baseline"


def test_a_stage_that_took_no_time_has_no_ratio() -> None:
    old, new = timing(denoise=steady(1.0), extra=(0.0,) * 6), timing(denoise=steady(1.0), extra=steady(1.0))
    extra = compare_timings(old, new, 0.05)[1]
    assert (extra.stage, extra.ratio, extra.verdict) == ("extra", None, "slower")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": "another CPU"}, "the CPU of the baseline is CPU, and that of this run is another CPU"),
        ({"cores": 4}, "the number of cores of the baseline is 2, and that of this run is 4"),
        ({"gpu": "L40S"}, "the GPU of the baseline is no GPU, and that of this run is L40S"),
        ({"model": "pocket"}, "the model of the baseline is tiny, and that of this run is pocket"),
        ({"digest": "e"}, "the digest of the model of the baseline"),
        ({"loras": ("x:1",)}, "the LoRAs of the baseline is no LoRAs, and that of this run is x:1"),
        ({"size": Size(width=64, height=128)}, "the size of the baseline is 128x128, and that of this run is 64x128"),
        ({"steps": 8}, "the number of steps of the baseline is 4, and that of this run is 8"),
        ({"guidance": 4.0}, "the guidance scale of the baseline is 1.0, and that of this run is 4.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_conditions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_baseline(timing(denoise=steady(1.0)), replace(CONDITIONS, **changes), 6)
    assert_says(str(refused.value), message)
    assert refused.value.option == "baseline"


@pytest.mark.parametrize(("before", "now", "enough"), [(5, 5, True), (4, 4, False), (1, 50, False), (3, 10, True)])
def test_a_verdict_needs_enough_edits(before: int, now: int, enough: bool) -> None:
    """With fewer, no result of the test is below its p."""
    earlier = timing(denoise=steady(1.0, before))
    later = timing(denoise=steady(9.0, now))
    assert (compare_timings(earlier, later, 0.05)[0].verdict == "slower") == enough
    if enough:
        return check_baseline(earlier, CONDITIONS, now)
    with pytest.raises(RequestError, match="too few") as refused:
        check_baseline(earlier, CONDITIONS, now)
    assert refused.value.option == "repeats"


def test_a_timing_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = timing(denoise=steady(1.0))
    (tmp_path / "x.json").write_text(json.dumps(to_plain(written)))
    assert read_timing(tmp_path / "x.json") == written


PLAIN = to_plain(timing(denoise=steady(1.0)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no timing"),
        (b"\xff\xfe", "no timing"),
        (b"[" * 100_000, "no timing"),
        (b"[]", "expected an object"),
        (json.dumps(PLAIN | {"schema": 2}).encode(), "schema is 2, expected 1"),
        (json.dumps(PLAIN | {"extra": 1}).encode(), "unknown key 'extra'"),
        (json.dumps(PLAIN | {"stages": []}).encode(), "expected each once"),
        (json.dumps(PLAIN | {"stages": PLAIN["stages"] + PLAIN["stages"]}).encode(), "expected each once"),
        (json.dumps(PLAIN | {"stages": [{"stage": "edit", "first": 1.0, "seconds": []}]}).encode(), "no measured"),
        (json.dumps(PLAIN | {"stages": [{"stage": "edit", "first": 1.0, "seconds": [-1]}]}).encode(), "from 0 to"),
        (json.dumps(PLAIN | {"stages": [{"stage": "edit", "first": 1.0, "seconds": [float("nan")]}]}).encode(),
         "expected a number"),
        (json.dumps(PLAIN | {"stages": [*PLAIN["stages"][:-1], {"stage": "edit", "first": 1.0, "seconds": [1]}]}
                    ).encode(), "differ in their number"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_timing_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RequestError, match=message) as refused:
        read_timing(tmp_path / "x.json")
    assert refused.value.option == "baseline"


def test_a_baseline_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_timing(tmp_path / "x.json")
    with pytest.raises(RequestError, match="cannot be read"):
        read_timing(tmp_path)


def test_a_bundle_is_timed(bundle: Path) -> None:
    """Its stages and settings; no time is asserted."""
    work = workload(open_bundle(bundle), size=(64, 96), steps=2, guidance=3.0)
    found = time_bundle(work, warm_up=0, repeats=2)
    timed = {stage.stage: (stage.first, *stage.seconds) for stage in found.stages}
    assert min(timed["vision"]) > 0  # an edit of a cache would be timed in its place
    assert min(timed["language"]) > 0
    assert [stage.stage for stage in found.stages] == [
        "vision", "language", "encode", "modulation", "denoise", "decode", "other", "edit",
    ]  # fmt: skip
    assert all(len(stage.seconds) == 2 for stage in found.stages)
    assert (str(found.conditions.size), found.conditions.steps, found.conditions.guidance) == ("64x96", 2, 3.0)
    assert str(found.conditions.input_size) == "64x96"
    assert (found.bundle, found.conditions.model, found.conditions.gpu) == ("tiny-cpu", "tiny", None)
    assert found.host_peak_bytes > 2**20
    assert found.gpu_peak_bytes is None
    assert found.engines[0].startswith("vision: onnxruntime ")


def test_the_edit_is_that_of_the_model_by_default(bundle: Path) -> None:
    work = workload(open_bundle(bundle))
    defaults = work.bundle.manifest.defaults
    assert (work.conditions.steps, work.conditions.guidance) == (defaults.steps, defaults.guidance)
    assert work.conditions.size.area == work.bundle.manifest.model.areas.vae_area


def test_a_size_that_the_bundle_does_not_take_becomes_one_that_it_takes(bundle: Path) -> None:
    work = workload(open_bundle(bundle), size=(999_999, 16))
    limits = work.bundle.manifest.limits
    assert work.conditions.size == work.conditions.input_size
    assert work.conditions.size.width <= limits.max_side
    assert work.conditions.size.height >= limits.min_side


def test_an_edit_that_the_bundle_does_not_take_is_refused(bundle: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(RequestError, match="steps"):
        workload(opened, steps=5000)
    with pytest.raises(EngineMismatchError):
        workload(opened, device=3)
