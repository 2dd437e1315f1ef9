"""The shape of a result: that of the last image, or a note that says what became of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def request(image: tuple[int, int], **changes: Any) -> Request:
    fields: dict[str, Any] = {"images": [smooth_image(*image)], "instructions": ["x"], "seeds": [1], "steps": 1,
                              "guidance": 1.0}  # fmt: skip
    return Request(**fields | changes)


@pytest.mark.parametrize("size", [(300, 100), (500, 100), (100, 360), (100, 1000), (31, 200)])
def test_an_image_beyond_the_buckets_is_brought_to_the_grid_of_its_result(
    opened: Bundle, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = uncached_editor(opened)
    encoded: list[tuple[int, ...]] = []
    encode = editor.stages.encode

    def watch(images: Any, **more: Any) -> Any:
        encoded.extend(image_HWC.shape[:2] for image_HWC in images)
        return encode(images, **more)

    monkeypatch.setattr(editor.stages, "encode", watch)
    edit = editor.edit(request(size))
    assert edit.size in opened.manifest.limits.buckets
    assert encoded == [(edit.size.height, edit.size.width)]
    (note,) = edit.notes
    assert note.startswith(f"the image is {size[0]}x{size[1]} and is edited at {edit.size}, which makes it ")
    assert note.endswith("; match the input to undo that")
    assert "requested" not in note
    assert editor.edit(request(size, match_input=True)).notes == ()


def test_only_the_image_that_gives_the_size_is_moved(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = uncached_editor(opened)
    encoded: list[tuple[int, ...]] = []
    encode = editor.stages.encode

    def watch(images: Any, **more: Any) -> Any:
        encoded.extend(image_HWC.shape[:2] for image_HWC in images)
        return encode(images, **more)

    monkeypatch.setattr(editor.stages, "encode", watch)
    edit = editor.edit(request((300, 100), images=[smooth_image(90, 150), smooth_image(300, 100)]))
    assert encoded == [(160, 96), (edit.size.height, edit.size.width)]


@pytest.mark.parametrize(
    ("size", "change"),
    [((640, 427), "11% wider"),
     ((333, 500), "11% taller"), ((150, 97), "8% wider"), ((160, 96), None), ((161, 96), None),
     ((800, 480), None), ((128, 128), None), ((1280, 1280), None)],
)  # fmt: skip
def test_an_aspect_that_changes_is_said(opened: Bundle, size: tuple[int, int], change: str | None) -> None:
    settings = resolve(request(size), opened.manifest)
    width, height = settings.size.width, settings.size.height
    assert (abs(width / height / (size[0] / size[1]) - 1) > 0.01) == (len(settings.notes) == 1)
    if change is not None:
        assert change in settings.notes[0]
    assert resolve(request(size, match_input=True), opened.manifest).notes == ()
    assert settings.reference is None


@pytest.mark.parametrize("size", [(128, 96), (96, 64), (64, 64), (96, 160)])
def test_a_grid_that_is_not_the_images_own_is_said(opened: Bundle, size: tuple[int, int]) -> None:
    settings = resolve(request((160, 96), size=size), opened.manifest)
    assert settings.notes == (
        f"the image is encoded at 160x96 and the result is {size[0]}x{size[1]}: the result may show a part of the "
        "image, or more than it; leave the size out to edit the whole image",
    )
    assert settings.reference is None
    assert resolve(request((160, 96), size=(160, 96)), opened.manifest).notes == ()


def test_a_narrow_result_is_the_whole_image(opened: Bundle) -> None:
    """An identity would be a picture of equal means left and right; here the reference's own latents say the same."""
    editor = uncached_editor(opened)
    image = smooth_image(400, 100)
    size = editor.edit(request((400, 100))).size
    first = editor.edit(request((400, 100), images=[image]))
    squeezed = image.resize((size.width, size.height))
    second = editor.edit(request((1, 1), images=[squeezed]))
    assert second.size == size
    difference = np.abs(np.asarray(first.images[0], float) - np.asarray(second.images[0], float)).mean()
    assert difference < 3  # the vision tower sees another aspect, the VAE the same image
