"""Editors and files in several threads: every result is right, or the call is refused."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import Residency
from qie.engines.editing.request import Request
from qie.engines.errors import RequestError
from tests.support.command_line import opened
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image
from tests.support.soak import attempts

THREADS = 4


def request(number: int) -> Request:
    """One of six requests of different sizes and lengths."""
    return Request(
        images=[smooth_image(150, 90, number % 3)],
        instructions=["make it red" + " and blue" * (number % 2)],
        seeds=[number % 6],
        steps=1,
        guidance=1.0,
        size=[(64, 64), (96, 64), (64, 96)][number % 3],
    )


@pytest.fixture(scope="module")
def wanted(bundle: Path) -> list[bytes]:
    editor = uncached_editor(open_bundle(bundle), residency="resident")
    return [editor.edit(request(number)).images[0].tobytes() for number in range(6)]


@pytest.mark.parametrize("residency", ["resident", "sequential"])
@pytest.mark.parametrize("editors", [1, 2, THREADS])
def test_threads_share_editors(bundle: Path, wanted: list[bytes], residency: Residency, editors: int) -> None:
    shared = [uncached_editor(open_bundle(bundle), residency=residency) for _ in range(editors)]
    count = attempts(48, 216)

    def edit(number: int) -> bytes:
        return shared[number % editors].edit(request(number)).images[0].tobytes()

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(edit, range(count)))
    assert sum(result == wanted[number % 6] for number, result in enumerate(results)) == count


def test_closing_waits_for_the_edit_of_another_thread(bundle: Path, wanted: list[bytes]) -> None:
    editor = uncached_editor(open_bundle(bundle), residency="resident")
    began, results = threading.Event(), []

    def edit() -> None:
        for number in range(6):
            edit = editor.edit(request(number), progress=lambda *_: began.set())
            results.append(edit.images[0].tobytes())

    thread = threading.Thread(target=edit)
    thread.start()
    began.wait()
    while thread.is_alive():
        editor.close()
    assert results == wanted


@pytest.mark.parametrize("where", ["progress", "observer", "on_image"])
def test_an_edit_inside_an_edit_is_refused(bundle: Path, wanted: list[bytes], where: str) -> None:
    editor = uncached_editor(open_bundle(bundle))
    refused: list[str] = []

    def again(*_: object) -> None:
        with pytest.raises(RequestError) as problem:
            editor.edit(request(0))
        refused.append(str(problem.value))

    hooks = {where: again}
    edit = editor.edit(request(1), **hooks)  # type: ignore[arg-type]
    assert edit.images[0].tobytes() == wanted[1]
    assert set(refused) == {"an edit cannot start inside another one of the same editor; use a second editor"}
    assert editor.edit(request(0)).images[0].tobytes() == wanted[0]


def test_a_failed_edit_leaves_the_editor_usable(bundle: Path, wanted: list[bytes]) -> None:
    editor = uncached_editor(open_bundle(bundle))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for hooks in ({"progress": fail}, {"observer": fail}, {"on_image": fail}):
        with pytest.raises(ZeroDivisionError):
            editor.edit(request(0), **hooks)  # type: ignore[arg-type]
        assert editor.edit(request(0)).images[0].tobytes() == wanted[0]


def test_images_saved_under_one_name_are_whole(workplace: Path) -> None:
    from qie.engines.inputs.image import save_image

    images = [smooth_image(300, 200, seed) for seed in range(THREADS)]
    whole = {image.tobytes() for image in images}

    def save(number: int) -> bool:
        save_image(images[number % THREADS], workplace / "out.png")
        return opened(workplace / "out.png").tobytes() in whole

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(save, range(40)))
    assert [path.name for path in workplace.iterdir() if path.name != "photo.png"] == ["out.png"]
