"""Requests against a manifest: defaults, and what is refused with the option that fixes it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import Manifest
from qie.engines.editing.edit import start_noise
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.editing.stages import Stages
from qie.engines.errors import ImageError, RequestError

IMAGE = Image.new("RGB", (150, 90))


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def request(**changes: Any) -> Request:
    return replace(Request(images=[IMAGE], instructions=["make it red", "add snow"], seeds=[3, 4]), **changes)


def test_defaults_are_the_manifests(manifest: Manifest) -> None:
    settings = resolve(request(), manifest)
    assert (settings.steps, settings.guidance) == (manifest.defaults.steps, manifest.defaults.guidance)
    assert settings.guided == (manifest.defaults.guidance > 1)
    assert settings.samples == ((0, 3), (0, 4), (1, 3), (1, 4))
    assert str(settings.size) == "160x96"
    assert settings.notes == ()


def test_a_request_goes_before_the_defaults(manifest: Manifest) -> None:
    settings = resolve(request(steps=7, guidance=1.0, size=(70, 130)), manifest)
    assert (settings.steps, settings.guidance, settings.guided) == (7, 1.0, False)
    assert str(settings.size) == "64x128"
    assert settings.notes[0] == "requested 70x130, using 64x128: sides are multiples of 16 pixels"
    assert "encoded at 160x96" in settings.notes[1]


def test_a_seed_is_drawn(manifest: Manifest) -> None:
    first, second = (resolve(request(seeds=None), manifest).samples for _ in range(2))
    assert len(first) == 2
    assert first != second


@pytest.mark.parametrize(
    ("changes", "kind", "option"),
    [
        ({"images": []}, ImageError, None),
        ({"images": [IMAGE] * 4}, ImageError, "images"),
        ({"images": [Image.new("RGB", (3000, 5))]}, ImageError, None),
        ({"instructions": []}, RequestError, "instructions"),
        ({"negative": "\udfff"}, RequestError, "instructions"),
        ({"seeds": []}, RequestError, "seeds"),
        ({"steps": 1001}, RequestError, "steps"),
        ({"guidance": float("nan")}, RequestError, "guidance"),
        ({"size": (0, 64)}, RequestError, "size"),
        ({"guidance": 1e39}, RequestError, "guidance"),
        ({"guidance": "4"}, RequestError, "guidance"),
        ({"images": IMAGE}, RequestError, "images"),
        ({"images": "photo.png"}, RequestError, "images"),
        ({"images": [None]}, ImageError, None),
        ({"images": [Image.new("RGBA", (64, 64))]}, ImageError, None),
        ({"images": [Image.new("YCbCr", (64, 64))]}, ImageError, None),
        ({"instructions": "blur it"}, RequestError, "instructions"),
        ({"instructions": [None]}, RequestError, None),
        ({"negative": None}, RequestError, None),
        ({"seeds": 3}, RequestError, "seeds"),
        ({"seeds": iter([1, 2])}, RequestError, "seeds"),
        ({"steps": 2.0}, RequestError, "steps"),
        ({"steps": True}, RequestError, "steps"),
        ({"size": "64x64"}, RequestError, "size"),
        ({"size": (64.0, 64)}, RequestError, "size"),
    ],
)
def test_refused(manifest: Manifest, changes: dict[str, Any], kind: type[RequestError], option: str | None) -> None:
    with pytest.raises(RequestError) as problem:
        resolve(request(**changes), manifest)
    assert (type(problem.value), problem.value.option) == (kind, option)


def test_a_negative_prompt_without_guidance_is_noted(manifest: Manifest) -> None:
    notes = resolve(request(negative="blurry", guidance=1.0), manifest).notes
    assert notes == ("the negative prompt 'blurry' is not used: guidance is off at a scale of 1",)
    assert resolve(request(negative="blurry", guidance=4.0), manifest).notes == ()


@pytest.mark.parametrize(
    "noise", [np.zeros((4, 60, 64)), np.zeros((4, 60, 63), "f"), np.full((4, 60, 64), np.nan, "f")]
)
def test_noise_of_another_kind(manifest: Manifest, noise: NDArray[Any]) -> None:
    with pytest.raises(RequestError, match=r"give finite float32 values of shape \(4, 60, 64\)"):
        start_noise(request(noise=noise), resolve(request(), manifest), manifest)


def test_an_unknown_residency(bundle: Path) -> None:
    with pytest.raises(RequestError, match="the residency is 'eager'; choose resident or sequential"):
        Stages(open_bundle(bundle), residency="eager")  # type: ignore[arg-type]
