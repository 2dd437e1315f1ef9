"""One instruction for many images: the bytes of single edits, what is done is skipped, a failure stops nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.inputs.image import load_image
from qie.engines.serving.each import RECORD, Outcome, edit_each, targets
from tests.support.images import smooth_image

REQUEST = Request(images=[], instructions=["make it red"], seeds=[3], steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abcdef"]
    for seed, path in enumerate(paths):
        smooth_image(150 if seed % 2 else 100, 90, seed=seed).save(path)
    return paths


def run(bundle: Path, photos: list[Path], out: Path, request: Request = REQUEST) -> list[Outcome]:
    out.mkdir(exist_ok=True)
    outcomes: list[Outcome] = []
    edit_each(Editor(bundle), targets(photos, out), request, on_outcome=outcomes.append)
    return outcomes


def test_the_results_are_those_of_single_edits(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    outcomes = run(bundle, photos, tmp_path / "out")
    assert [(o.image, o.seed, o.done_before, o.problem) for o in outcomes] == [(p, 3, False, None) for p in photos]
    with Editor(bundle) as editor:
        for outcome in outcomes:
            request = Request(
                images=[load_image(outcome.image).image], instructions=["make it red"], seeds=[3], steps=2
            )
            assert np.array_equal(np.asarray(Image.open(outcome.result)), np.asarray(editor.edit(request).images[0]))


def test_what_is_done_is_skipped(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(bundle, photos[:3], out)
    written = {o.result: o.result.stat().st_mtime_ns for o in first}
    again = run(bundle, photos, out)
    assert [o.done_before for o in again] == [True] * 3 + [False] * 3
    assert {path: path.stat().st_mtime_ns for path in written} == written

    photos[0].write_bytes(photos[1].read_bytes())
    first[1].result.unlink()
    changed = run(bundle, photos, out)
    assert [o.done_before for o in sorted(changed, key=lambda o: o.image)] == [False, False, True, True, True, True]
    other = run(bundle, photos, out, Request(images=[], instructions=["make it blue"], seeds=[3], steps=2))
    assert not any(o.done_before for o in other)


def test_random_seeds_are_told_and_kept(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    request = Request(images=[], instructions=["make it red"], steps=2)
    first = run(bundle, photos[:2], tmp_path / "out", request)
    again = run(bundle, photos[:2], tmp_path / "out", request)
    assert [o.seed for o in first] == [o.seed for o in again]
    assert len({o.seed for o in first}) == 2
    assert all(o.done_before for o in again)


def test_an_image_that_fails_stops_no_other(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    photos[1].write_bytes(b"no image")
    photos[3].unlink()
    outcomes = {o.image: o for o in run(bundle, photos, tmp_path / "out")}
    assert [photo for photo in photos if outcomes[photo].problem is not None] == [photos[1], photos[3]]
    assert "does not exist" in str(outcomes[photos[3]].problem) or "cannot be read" in str(outcomes[photos[3]].problem)


def test_a_torn_line_of_the_record_is_no_line(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(bundle, photos[:2], out)
    record = out / RECORD
    lines = record.read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [3, 3]
    record.write_text(f"{lines[0]}\n{lines[1][:20]}")
    assert [o.done_before for o in run(bundle, photos[:2], out)] == [True, False]
    assert [o.done_before for o in run(bundle, photos[:2], out)] == [True, True]


def test_two_images_of_one_name_have_two_results(tmp_path: Path) -> None:
    images = [tmp_path / "x" / "cat.png", tmp_path / "y" / "cat.jpg", tmp_path / "Cat.webp", tmp_path / "x" / "cat.png"]
    assert [path.name for path in targets(images, tmp_path / "out").values()] == ["cat.png", "cat-2.png", "Cat-3.png"]


def test_the_command(bundle: Path, photos: list[Path], tmp_path: Path, qie: Any) -> None:
    out = tmp_path / "out"
    done = qie(
        "run", "--each", *photos[:2], "make it red", "-o", out, "--bundle", bundle, "--seed", "3", "--steps", "2"
    )
    assert done.stdout.splitlines() == [str(out / "a.png"), str(out / "b.png")]
    assert "2 edited, 0 done before, 0 failed" in done.stderr
