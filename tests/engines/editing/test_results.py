"""Results as they come: each image when it is decoded, what is no number refused, and no more than fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import Residency
from qie.engines.editing import edit as edit_module
from qie.engines.editing.request import Request
from qie.engines.editing.settings import GUIDANCE_MAX, RESULTS_MAX
from qie.engines.errors import EngineError, RequestError
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def request(**changes: Any) -> Request:
    fields: dict[str, Any] = {"images": [smooth_image(150, 90)], "instructions": ["make it red"], "steps": 2,
                              "seeds": [1, 2, 3, 4, 5], "guidance": 1.0, "size": (64, 64)}  # fmt: skip
    return Request(**fields | changes)


def limited(bundle: Bundle, batch_max: int) -> Bundle:
    limits = replace(bundle.manifest.limits, batch_max=batch_max)
    return replace(bundle, manifest=replace(bundle.manifest, limits=limits))


@pytest.mark.parametrize("residency", ["resident", "sequential"])
def test_an_image_is_there_before_the_next_batch_begins(opened: Bundle, residency: Residency) -> None:
    happened: list[tuple[str, int]] = []
    editor = uncached_editor(limited(opened, 2), residency=residency)
    edit = editor.edit(
        request(),
        progress=lambda stage, done, _: happened.append((stage, done)),
        on_image=lambda number, _: happened.append(("image", number)),
    )
    order = [what for what in happened if what[0] in ("image", "denoise")]
    assert order == [("denoise", 0), ("denoise", 1), ("denoise", 2), ("image", 0), ("image", 1),
                     ("denoise", 2), ("denoise", 3), ("denoise", 4), ("image", 2), ("image", 3),
                     ("denoise", 4), ("denoise", 5), ("denoise", 6), ("image", 4)]  # fmt: skip
    assert [done for stage, done in happened if stage == "decode"] == [0, 1, 2, 2, 3, 4, 4, 5]
    assert len(edit.images) == 5


def test_where_loading_is_expensive_all_are_denoised_first(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qie.engines.editing.stages.Stages.loads_cheaply", False)
    stages: list[str] = []
    editor = uncached_editor(limited(opened, 2), residency="sequential")
    edit = editor.edit(request(), progress=lambda stage, *_: stages.append(stage))
    assert stages.index("decode") > max(n for n, stage in enumerate(stages) if stage == "denoise")
    assert len(edit.images) == 5


def test_images_come_as_they_are_returned(opened: Bundle) -> None:
    """Instructions of several lengths, so that batches are not in the order of the samples."""
    came: dict[int, Image.Image] = {}
    wanted = request(instructions=["replace the cat with a dog", "redden it"], seeds=[1, 2], match_input=True)
    edit = uncached_editor(limited(opened, 2)).edit(wanted, on_image=came.__setitem__)
    assert len(came) == 4
    assert all(came[number] is image for number, image in enumerate(edit.images))
    together = uncached_editor(opened).edit(wanted)
    assert [image.tobytes() for image in together.images] == [image.tobytes() for image in edit.images]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (3, 15, 63), (1, 7, 31)])
def test_one_number_that_is_none_is_refused(
    opened: Bundle, monkeypatch: pytest.MonkeyPatch, value: float, place: tuple[int, int, int]
) -> None:
    def denoise(denoiser: Any, **_: Any) -> Any:
        latents_BNC = np.zeros(denoiser.shape, np.float32)
        if denoiser.shape[0] > place[0]:
            latents_BNC[place] = value
        return latents_BNC

    monkeypatch.setattr(edit_module, "denoise", denoise)
    came: list[int] = []
    with pytest.raises(EngineError, match="latents that are not finite; check the bundle with `qie inspect --verify`"):
        uncached_editor(opened).edit(request(), on_image=lambda number, _: came.append(number))
    assert came == []


@pytest.mark.parametrize("guidance", [1e38, 1e300, -1e300, 1e7, float("inf"), float("nan"), 10**400])
def test_guidance_beyond_reason_is_refused(opened: Bundle, guidance: float) -> None:
    with pytest.raises(RequestError, match="the guidance scale is"):
        uncached_editor(opened).edit(request(guidance=guidance))


@pytest.mark.parametrize("guidance", [0.0, -3.0, 1.0001, 30.0, 1000.0, GUIDANCE_MAX])
def test_guidance_within_the_bound_gives_numbers(opened: Bundle, guidance: float) -> None:
    assert len(uncached_editor(opened).edit(request(seeds=[1], guidance=guidance)).images) == 1


@pytest.mark.parametrize(("instructions", "seeds"), [(1, RESULTS_MAX + 1), (2, RESULTS_MAX), (1, 10**6), (1000, 1000)])
def test_more_results_than_fit_are_refused(opened: Bundle, instructions: int, seeds: int) -> None:
    with pytest.raises(RequestError, match=f"more results than {RESULTS_MAX}; ask for them in several requests"):
        uncached_editor(opened).edit(request(instructions=["x"] * instructions, seeds=range(seeds)))
