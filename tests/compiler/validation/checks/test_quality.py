"""Whole edits pass where they are the reference's, and each fault fails the checks that are for it."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import affine_transform

from qie.compiler.validation.checks import quality
from qie.compiler.validation.golden.file import Golden, GoldenCase
from qie.compiler.validation.report import CaseImages, Measurement
from qie.compiler.validation.subject import Subject, request_of
from qie.engines.errors import BackendMissingError
from tests.support.editors import uncached_editor
from tests.support.lpips import SCALE, install
from tests.support.subjects import ON, checked, only, reasons, shown, using, with_images

CASES = ["wide", "tall with guidance", "two images", "five in a row"]
PARTLY = "five in a row"
"""A case that leaves most of its input alone."""

METRICS = ["psnr", "ssim", "shift", "scale", "delta_e", "max_drop_db"]


def failing(subject: Subject) -> set[str]:
    """The metrics whose checks fail; none is left out."""
    results = {name: [check.result for check in checked(subject, name)] for name in METRICS}
    assert all(set(found) <= {"passed", "failed"} for found in results.values()), results
    return {name for name, found in results.items() if "failed" in found}


def changed(
    subject: Subject, golden: Golden, change: Callable[[np.ndarray], np.ndarray], case: str = PARTLY
) -> Subject:
    """The engines beside a reference whose edit was changed."""
    return using(subject, with_images(only(golden, case), lambda case: {"edit": change(np.asarray(case.edit))}))


def moved(image: np.ndarray, *, down: float = 0, scale: float = 1) -> np.ndarray:
    """The image with its content moved and enlarged, by cubic splines."""
    center = (np.array(image.shape[:2]) - 1) / 2
    offset = center - (center + np.array([down, 0])) / scale
    channels = [
        affine_transform(image[..., c].astype(float), [1 / scale] * 2, offset, order=3, mode="nearest")
        for c in range(3)
    ]
    return np.stack(channels, axis=2).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["psnr", "ssim", "shift", "scale"])
def test_a_sound_bundle_passes_in_every_case(sound: Subject, name: str) -> None:
    checks = checked(sound, name)
    assert [(check.case, check.result, check.on) for check in checks] == [(case, "passed", ON) for case in CASES]


def test_colors_are_compared_where_the_reference_leaves_the_input_alone(sound: Subject) -> None:
    checks = checked(sound, "delta_e")
    assert [(check.case, check.result) for check in checks] == [(PARTLY, "passed")]
    assert checks[0].detail == "25% of the pixels, which the reference leaves alone"


def test_exact_answers_are_as_far_as_from_the_reference(sound: Subject) -> None:
    checks = checked(sound, "max_drop_db")
    assert [check.result for check in checks] == ["passed"] * 4
    assert checks[0].detail == "32.20 dB against the exact answer, the reference's edit 32.20 dB"


def test_the_edits_themselves_and_the_time_of_every_stage_are_shown(sound: Subject, golden: Golden) -> None:
    outcomes = shown(sound, "psnr")
    images = [outcome for outcome in outcomes if isinstance(outcome, CaseImages)]
    assert [image.case for image in images] == CASES
    assert [len(image.inputs) for image in images] == [1, 1, 2, 1]
    for image, case in zip(images, golden.cases, strict=True):
        assert image.instruction == case.record.instruction
        with Image.open(io.BytesIO(image.reference)) as reference, Image.open(io.BytesIO(image.edit)) as edit:
            assert reference.size == edit.size == (case.record.width, case.record.height)
            assert np.array_equal(np.asarray(reference), np.asarray(case.edit))
    seconds = [outcome for outcome in outcomes if isinstance(outcome, Measurement)]
    assert {m.name for m in seconds if m.case == "wide"} >= {"vision", "language", "encode", "denoise", "decode"}
    assert all(m.unit == "s" and m.value >= 0 for m in seconds)


def test_edits_run_once_for_all_checks(sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = using(sound, only(golden, "two images"))
    for name in METRICS[:1]:
        checked(subject, name)
    monkeypatch.setattr("qie.compiler.validation.edits.edit", None)
    for name in METRICS[1:4]:
        assert [check.result for check in checked(subject, name)] == ["passed"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda image: moved(image, down=-1), {"psnr", "ssim", "shift", "delta_e"}),
        (lambda image: moved(image, scale=0.98), {"psnr", "ssim", "scale", "delta_e"}),
        (lambda image: (image * [1.0, 1.0, 0.97]).astype(np.uint8), {"psnr", "delta_e"}),
        (lambda image: (image * 0.9).astype(np.uint8), {"psnr", "ssim", "delta_e"}),
    ],
    ids=["shifted", "zoomed", "color cast", "darker"],
)
def test_a_fault_fails_the_checks_that_are_for_it(
    sound: Subject, golden: Golden, change: Callable[[np.ndarray], np.ndarray], expected: set[str]
) -> None:
    found = failing(changed(sound, golden, change))
    assert expected <= found
    assert not ({"shift", "scale"} - expected) & found


def test_a_shift_and_a_scale_are_measured(sound: Subject, golden: Golden) -> None:
    (shift,) = checked(changed(sound, golden, lambda image: moved(image, down=-1)), "shift")
    assert shift.value == pytest.approx(1, abs=0.05)
    assert shift.detail.startswith("+1.0")
    (scale,) = checked(changed(sound, golden, lambda image: moved(image, scale=0.98)), "scale")
    assert scale.value == pytest.approx(0.0204, abs=0.001)
    assert scale.detail.startswith("102.0")


def test_noise_of_another_seed_fails(sound: Subject, golden: Golden) -> None:
    def other(case: GoldenCase) -> dict[str, Image.Image]:
        with uncached_editor(sound.bundle) as editor:
            return {"edit": editor.edit(request_of(case, noise=None, seeds=[case.record.seed + 1])).images[0]}

    assert failing(using(sound, with_images(only(golden, PARTLY), other))) >= {"psnr", "ssim", "delta_e"}


def test_an_edit_that_is_worse_than_the_references_loses(sound: Subject, golden: Golden) -> None:
    def exact(case: GoldenCase) -> dict[str, np.ndarray]:
        answer = np.asarray(case.target)
        return {"edit": (answer // 2 + np.asarray(case.edit) // 2).astype(np.uint8)}

    (check,) = checked(using(sound, with_images(only(golden, "wide"), exact)), "max_drop_db")
    assert check.result == "failed"
    assert check.value is not None and 2 < check.value < 10


def test_a_reference_that_is_the_exact_answer_loses_nothing_by_equal_edits(sound: Subject, golden: Golden) -> None:
    def own(case: GoldenCase) -> dict[str, Image.Image]:
        with uncached_editor(sound.bundle) as editor:
            edit = editor.edit(request_of(case)).images[0]
        return {"edit": edit, "target": edit}

    (check,) = checked(using(sound, with_images(only(golden, "two images"), own)), "max_drop_db")
    assert (check.value, check.result) == (0, "passed")


def test_another_size_fails_every_check(sound: Subject, golden: Golden) -> None:
    subject = changed(sound, golden, lambda image: image[:, :-16])
    for name in METRICS:
        (check,) = checked(subject, name)
        assert check.result == "failed"
        assert check.detail == "the edit has 128x128 pixels, expected 112x128"


def test_latents_that_are_not_finite_fail_every_check(
    sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = golden.cases[1].noise
    monkeypatch.setattr("qie.engines.editing.edit.denoise", lambda *_, **__: np.full_like(noise[None], np.nan))
    subject = using(sound, only(golden, PARTLY))
    for name in METRICS:
        (check,) = checked(subject, name)
        assert check.result == "failed"
        assert check.detail.startswith("it could not be computed: the transformer of ")
        assert "latents that are not finite; " in check.detail
    assert shown(subject, "psnr") == []


def test_a_case_that_the_bundle_does_not_take_is_not_run(sound: Subject, golden: Golden) -> None:
    subject = using(sound, only(golden, PARTLY, steps=100_000))
    (check,) = checked(subject, "psnr")
    assert check.result == "not run"
    assert check.detail.startswith(
        "the bundle does not take this case: the number of steps is 100000, expected at most"
    )


@pytest.mark.parametrize("name", [*METRICS, "lpips"])
def test_nothing_runs_without_a_golden_file_or_engines(sound: Subject, name: str) -> None:
    (check,) = checked(using(sound, None), name)
    assert (check.result, check.detail, check.case) == ("not run", "no golden file; record one", None)
    blind = replace(sound, executed=None, not_executed="no GPU here; run it elsewhere")
    (check,) = checked(blind, name)
    assert (check.result, check.detail, check.case) == ("not run", "no GPU here; run it elsewhere", None)


def test_what_no_case_can_say_does_not_apply(sound: Subject, golden: Golden) -> None:
    subject = using(sound, only(golden, "two images", target=False))
    assert reasons(subject, "max_drop_db") == ["no case of the golden file has an exact answer"]
    assert reasons(subject, "delta_e") == ["the reference leaves less than 5% of every case with one image alone"]


def test_a_place_that_cannot_be_told_is_not_run(sound: Subject, golden: Golden) -> None:
    flat = changed(sound, golden, lambda image: np.full_like(image, 90))
    noise = changed(sound, golden, lambda image: np.random.default_rng(0).integers(0, 256, image.shape, np.uint8))
    for name in ("shift", "scale"):
        (check,) = checked(flat, name)
        assert check.result == "not run"
        assert check.detail == "the reference's edit is flat and cannot be aligned; use a case with detail"
        (check,) = checked(noise, name)
        assert check.result == "not run"
        assert check.detail.endswith("too little in common to be aligned; see psnr and ssim")


def test_lpips_is_judged_where_it_is_installed(sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    calls = install(monkeypatch)
    assert [check.result for check in checked(sound, "lpips")] == ["passed"] * 4
    assert [call["shape"] for call in calls] == [(1, 3, 96, 160), (1, 3, 160, 96), *[(1, 3, 128, 128)] * 2]
    (check,) = checked(changed(sound, golden, lambda image: 255 - image), "lpips")
    assert check.result == "failed"
    assert check.value is not None and 0.01 < check.value < 4 * SCALE


def test_lpips_is_not_run_where_it_cannot_be_had(sound: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> float:
        raise BackendMissingError("lpips is not there; install it")

    monkeypatch.setattr(quality, "lpips", missing)
    (check,) = checked(sound, "lpips")
    assert (check.result, check.detail, check.case) == ("not run", "lpips is not there; install it", None)


def test_lpips_is_not_run_on_a_tiny_edit(sound: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SMALLEST", 97)
    wide, *_ = checked(using(sound, sound.golden and only(sound.golden, "wide")), "lpips")
    assert wide.result == "not run"
    assert wide.detail == "the edit has 160x96 pixels, and LPIPS takes sides from 97; use a larger case"
