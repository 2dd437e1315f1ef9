"""The shipped pocket model is complete and small, loads in qie and diffusers, and edits."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from pocket.data.images import HELD_OUT, center_crop
from pocket.judge import Case, Score, cases, pair_cases, score
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.metrics.error import psnr_db
from qie.compiler.quantization.calibration import read_calibration
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import ComponentRecipe, SchemeName
from qie.compiler.validation.reference import load_reference
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from tests.support.bundles import build
from tests.support.editors import uncached_editor

SEED = 7


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    return built(tmp_path_factory.mktemp("pocket") / "plain", "none")


def built(destination: Path, scheme: SchemeName) -> Editor:
    """The editor with a transformer quantized by ``scheme``, in a float32 carrier."""
    recipe = load_recipe("cpu")
    section = ComponentRecipe(precision="float32", scheme=scheme)
    recipe = replace(recipe, components=replace(recipe.components, transformer=section))
    return uncached_editor(build("pocket", destination, recipe, calibration=POCKET / "calibration.npz"))


def edit(editor: Editor, images: Sequence[np.ndarray], text: str) -> np.ndarray:
    inputs = [Image.fromarray(image) for image in images]
    return np.asarray(editor.edit(Request(images=inputs, instructions=[text], seeds=[SEED])).images[0])


def plain_cases(views: int = 2) -> list[Case]:
    """Every edit, in its plainest phrase, on the first photos or scenes."""
    by_name: dict[str, list[Case]] = {}
    for case in cases(phrases=1):
        by_name.setdefault(case.name, []).append(case)
    return [case for of_name in by_name.values() for case in of_name[:views]]


@pytest.fixture(scope="module")
def scores(plain: Editor) -> list[Score]:
    return score(partial(edit, plain), plain_cases())


def test_it_edits(scores: list[Score]) -> None:
    assert len(scores) == 19
    assert fmean(s.psnr_db for s in scores) > 22
    changed = [s for s in scores if s.unedited_psnr_db < 22]
    assert fmean(s.psnr_db - s.unedited_psnr_db for s in changed) > 6
    assert fmean(s.nearest for s in scores) >= 0.95


def test_it_combines_two_edits_that_training_never_combined(plain: Editor) -> None:
    pairs = score(partial(edit, plain), list(pair_cases())[:30])
    assert fmean(s.psnr_db - s.unedited_psnr_db for s in pairs) > 10
    assert fmean(s.nearest for s in pairs) >= 0.85


def test_its_vae_reconstructs_photos(plain: Editor) -> None:
    round_trips = []
    for name in HELD_OUT:
        image = center_crop(name)
        (decoded,) = plain.stages.decode(plain.stages.encode([image]))
        round_trips.append(psnr_db(decoded, image))
    assert fmean(round_trips) >= 28


@pytest.mark.parametrize(("scheme", "loss_db"), [("fp8", 0.3), ("int8-smooth", 0.5)])
def test_eight_bits_cost_little(scores: list[Score], tmp_path: Path, scheme: SchemeName, loss_db: float) -> None:
    quantized = score(partial(edit, built(tmp_path / scheme, scheme)), plain_cases())
    assert fmean(s.psnr_db for s in scores) - fmean(s.psnr_db for s in quantized) < loss_db
    assert fmean(s.nearest for s in scores) - fmean(s.nearest for s in quantized) <= 0.03


def test_diffusers_agrees(plain: Editor) -> None:
    reference = load_reference(POCKET)
    steps = plain.bundle.manifest.defaults.steps
    for case in [c for c in plain_cases(1) if c.name in ("sepia", "mirror", "colours of picture 2")]:
        inputs = [Image.fromarray(image) for image in case.images]
        theirs = reference.edit(inputs, case.text, steps=steps, seed=SEED, cfg=1.0)
        assert psnr_db(edit(plain, case.images, case.text), theirs) > 40


def test_it_is_small_and_complete() -> None:
    opened = open_checkpoint("pocket")
    assert opened.complete
    assert sum(file.stat().st_size for file in POCKET.glob("*/*.safetensors")) < 24e6
    calibration = read_calibration(POCKET / "calibration.npz")
    calibration.check_model(opened.digest())
    assert set(calibration.exclude) == {"transformer/fp8", "transformer/int8-smooth"}


def test_another_instruction_runs_too(plain: Editor) -> None:
    image = center_crop("chelsea")
    assert edit(plain, [image], "put a red hat on the person").shape == image.shape
