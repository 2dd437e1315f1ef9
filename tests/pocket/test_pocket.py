"""The shipped pocket model: whole, small, loadable by qie and diffusers alike, and an editor that edits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from pocket.judge import Case, Score, cases, pair_cases, psnr_db, score
from pocket.photographs import HELD_OUT, square
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.quantization.calibration import read_calibration
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import ComponentRecipe, SchemeName
from qie.compiler.validation.reference import load_reference
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from tests.support.bundles import build

SEED = 7


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return built(tmp_path_factory.mktemp("pocket") / "plain", "none")


def built(destination: Path, scheme: SchemeName) -> Editor:
    """The editor with a transformer quantized by ``scheme``, in a float32 carrier."""
    recipe = load_recipe("cpu")
    section = ComponentRecipe(precision="float32", scheme=scheme)
    recipe = replace(recipe, components=replace(recipe.components, transformer=section))
    calibration = read_calibration(POCKET / "calibration.npz")
    return Editor(build("pocket", destination, recipe, calibration=calibration))


def edit(editor: Editor, images: Sequence[np.ndarray], text: str) -> np.ndarray:
    pictures = [Image.fromarray(image) for image in images]
    return np.asarray(editor.edit(Request(images=pictures, instructions=[text], seeds=[SEED])).images[0])


def some(views: int = 2) -> list[Case]:
    """Every instruction, in its plainest words, on the first photographs or scenes."""
    found: dict[str, list[Case]] = {}
    for case in cases(phrases=1):
        found.setdefault(case.name, []).append(case)
    return [case for of_one in found.values() for case in of_one[:views]]


@pytest.fixture(scope="module")
def scores(plain: Editor) -> list[Score]:
    return score(partial(edit, plain), some())


def test_it_edits(scores: list[Score]) -> None:
    assert len(scores) == 19
    assert fmean(s.psnr_db for s in scores) > 22
    changed = [s for s in scores if s.unedited_psnr_db < 22]
    assert fmean(s.psnr_db - s.unedited_psnr_db for s in changed) > 6
    assert fmean(s.nearest for s in scores) >= 0.95


def test_it_does_two_things_at_once_that_it_was_never_shown_together(plain: Editor) -> None:
    found = score(partial(edit, plain), list(pair_cases())[:30])
    assert fmean(s.psnr_db - s.unedited_psnr_db for s in found) > 10
    assert fmean(s.nearest for s in found) >= 0.85


def test_its_vae(plain: Editor) -> None:
    trips = []
    for name in HELD_OUT:
        image = square(name)
        (decoded,) = plain.stages.decode(plain.stages.encode([image]))
        trips.append(psnr_db(decoded, image))
    assert fmean(trips) >= 28


@pytest.mark.parametrize(("scheme", "most"), [("fp8", 0.3), ("int8-smooth", 0.5)])
def test_eight_bits_cost_little(scores: list[Score], tmp_path: Path, scheme: SchemeName, most: float) -> None:
    found = score(partial(edit, built(tmp_path / scheme, scheme)), some())
    assert fmean(s.psnr_db for s in scores) - fmean(s.psnr_db for s in found) < most
    assert fmean(s.nearest for s in scores) - fmean(s.nearest for s in found) <= 0.03


def test_diffusers_makes_the_same(plain: Editor) -> None:
    reference = load_reference(POCKET)
    steps = plain.bundle.manifest.defaults.steps
    for case in [c for c in some(1) if c.name in ("sepia", "mirror", "colours of picture 2")]:
        pictures = [Image.fromarray(image) for image in case.images]
        theirs = reference.edit(pictures, case.text, steps=steps, seed=SEED, cfg=1.0)
        assert psnr_db(edit(plain, case.images, case.text), theirs) > 40


def test_it_is_small_and_whole() -> None:
    opened = open_checkpoint("pocket")
    assert opened.complete
    assert sum(file.stat().st_size for file in POCKET.rglob("*.safetensors")) < 24e6
    calibration = read_calibration(POCKET / "calibration.npz")
    calibration.check_model(opened.digest())
    assert set(calibration.exclude) == {"transformer/fp8", "transformer/int8-smooth"}


def test_another_instruction_runs_too(plain: Editor) -> None:
    image = square("chelsea")
    assert edit(plain, [image], "put a red hat on the person").shape == image.shape
