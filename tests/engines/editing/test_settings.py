"""Steps and sizes of an edit with a bundle that has modulation tables and no weights to make others."""

from dataclasses import replace
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import AddedSchedule, Manifest
from qie.engines.bundle.specs import Size
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.errors import RequestError
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.stored_schedules import sizes_with_tables, stored_schedules, table_name
from tests.support.images import smooth_image


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle with tables alone."""
    found = open_bundle(bundle).manifest
    modulation = replace(found.model.modulation, file=None, tensors=())
    return replace(found, model=replace(found.model, modulation=modulation))


def request(width: int = 64, height: int = 64, **options: object) -> Request:
    return Request(images=[smooth_image(width, height)], instructions=["make it red"], **options)  # type: ignore[arg-type]


def test_what_has_tables_is_taken_as_it_is(manifest: Manifest) -> None:
    assert [schedule.steps for schedule in stored_schedules(manifest)] == [4, 8, 20]
    for schedule in stored_schedules(manifest):
        assert schedule.sizes == manifest.limits.buckets
        for size in schedule.sizes:
            settings = resolve(request(size=(size.width, size.height), steps=schedule.steps), manifest)
            assert (settings.size, settings.steps) == (size, schedule.steps)


def test_other_steps_are_refused(manifest: Manifest) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(request(steps=5), manifest)
    assert caught.value.option == "steps"
    assert str(caught.value) == (
        "this bundle has no modulation tables of 5 steps, but of 4, 8 and 20; choose one of these, or add them with "
        "`qie add-schedule`"
    )
    with pytest.raises(RequestError, match="of 5 steps, nor of other numbers;"):
        resolve(request(steps=5), replace(manifest, schedules=()))
    with pytest.raises(RequestError, match="the number of steps is 0, expected at least 1"):
        resolve(request(steps=0), manifest)


def test_a_size_that_was_asked_for_is_refused(manifest: Manifest) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(request(size=(112, 112)), manifest)
    assert caught.value.option == "size"
    assert str(caught.value).startswith("this bundle has no modulation tables of 20 steps at 112x112, but at 128x128, ")
    assert str(caught.value).endswith("choose one of these sizes, or add it with `qie add-schedule`")


@pytest.mark.parametrize("match_input", [False, True])
def test_the_size_of_an_image_becomes_the_nearest(manifest: Manifest, match_input: bool) -> None:
    own, nearest = Size(width=192, height=96), Size(width=160, height=96)
    asked = request(2 * own.width, 2 * own.height, match_input=match_input)
    assert resolve(asked, manifest).size == own
    values = sigmas(manifest.model.scheduler, steps=20, noise_tokens=own.tokens)
    path = f"schedules/{table_name(manifest.model.modulation, values)}"
    without = replace(manifest, schedules=tuple(file for file in manifest.schedules if file.path != path))
    assert own not in sizes_with_tables(without, 20)
    found = resolve(asked, without)
    assert found.size == nearest
    assert found.reference == found.size  # the image is encoded in the shape in which it is edited
    assert found.notes[0] == (
        "the image is edited at 160x96 in place of 192x96, for which this bundle has no modulation tables of 20 steps"
    )
    assert len(found.notes) == (1 if match_input else 2)


def test_an_added_size_is_one_of_them(manifest: Manifest) -> None:
    size = Size(width=128, height=128)
    added = replace(
        manifest,
        limits=replace(manifest.limits, buckets=manifest.limits.buckets[1:]),
        added=(AddedSchedule(steps=4, sizes=(size,)),),
    )
    assert size in sizes_with_tables(added, 4)
