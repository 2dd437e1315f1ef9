"""Edits in a row are those of the reference, or the check fails."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qie.compiler.validation.golden.file import Golden, GoldenCase
from qie.compiler.validation.subject import Subject
from tests.support.subjects import checked, only, reasons, using, with_images

CHAIN = "five in a row"


def test_the_chain_of_a_sound_bundle_is_the_references(sound: Subject) -> None:
    (check,) = checked(sound, "drift")
    assert (check.result, check.case, len(check.steps)) == ("passed", CHAIN, 5)
    assert check.value == check.steps[-1]
    assert max(check.steps) < 0.05
    assert check.detail.startswith("PSNR and shift of the edits in a row: ")
    assert check.detail.count("; ") == 4


def test_every_edit_is_of_the_one_before(sound: Subject, golden: Golden) -> None:
    """A chain in which every edit was of the input has other images from the second on."""
    repeated = with_images(only(golden, CHAIN), lambda case: {f"chain.{k}": case.edit for k in range(5)})
    (check,) = checked(using(sound, repeated), "drift")
    assert check.result == "failed"
    assert check.steps[0] < 0.05
    assert check.steps[1] > 1


def test_colors_that_drift_fail(sound: Subject, golden: Golden) -> None:
    def paler(case: GoldenCase) -> dict[str, np.ndarray]:
        return {f"chain.{k}": (np.asarray(case.chain[k]) * (1 - 0.02 * k)).astype(np.uint8) for k in range(5)}

    (check,) = checked(using(sound, with_images(only(golden, CHAIN), paler)), "drift")
    assert check.result == "failed"
    assert list(check.steps) == sorted(check.steps)


def test_a_chain_of_another_size_fails(sound: Subject, golden: Golden) -> None:
    smaller = with_images(only(golden, CHAIN), lambda case: {"chain.2": case.chain[2].crop((0, 0, 64, 64))})
    (check,) = checked(using(sound, smaller), "drift")
    assert check.result == "failed"
    assert check.detail == "edit 3 has another size than the reference's"


def test_an_image_that_cannot_be_aligned_is_told(sound: Subject, golden: Golden) -> None:
    flat = with_images(only(golden, CHAIN, chain=2), lambda case: {"chain.1": Image.new("RGB", case.edit.size)})
    (check,) = checked(using(sound, flat), "drift")
    assert check.result == "failed"
    assert check.detail.endswith(" dB, cannot be aligned")


def test_it_is_not_run_without_a_chain_or_engines(sound: Subject, golden: Golden) -> None:
    assert reasons(using(sound, only(golden, "wide")), "drift") == ["no case of the golden file has edits in a row"]
    (check,) = checked(replace(sound, executed=None, not_executed="no GPU; run it elsewhere"), "drift")
    assert (check.result, check.detail) == ("not run", "no GPU; run it elsewhere")
    (check,) = checked(using(sound, only(golden, CHAIN, steps=100_000)), "drift")
    assert check.result == "not run"
    assert check.detail.startswith("the bundle does not take this case: ")


def test_a_chain_whose_first_edit_fails_fails(sound: Subject, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = golden.cases[3].noise
    monkeypatch.setattr("qie.engines.editing.edit.denoise", lambda *_, **__: np.full_like(noise[None], np.inf))
    (check,) = checked(using(sound, only(golden, CHAIN)), "drift")
    assert check.result == "failed"
    assert check.detail.startswith("it could not be computed: ")
