"""The pocket model's golden file is what its docstrings say, and equals the runtime wherever that is exact."""

from pathlib import Path

import numpy as np
import pytest

from pocket.cases import CASES
from pocket.data.edits import exact_result
from pocket.data.operations import Source
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.metrics.error import psnr_db
from qie.compiler.validation.golden.cases import CASES_FILE, read_cases
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden, GoldenCase
from qie.engines.inputs.noise import standard_normal
from qie.engines.inputs.prepare import prepare, resize
from qie.engines.inputs.prompt import PREFIX_TOKENS, encode
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.vision import vision_inputs

NAMES = [case.name for case in CASES]
MODEL = open_checkpoint("pocket", weights=False).model


@pytest.fixture(params=range(len(CASES)), ids=NAMES)
def case(request: pytest.FixtureRequest, pocket_golden: Golden) -> GoldenCase:
    return pocket_golden.cases[request.param]


def test_it_is_small() -> None:
    assert (POCKET / GOLDEN_FILE).stat().st_size < 2e6
    assert all(file.stat().st_size < 1e5 for file in (POCKET / "cases").iterdir())


def test_it_belongs_to_the_model(pocket_golden: Golden) -> None:
    record = pocket_golden.record
    assert (record.model, record.dtype, record.loras) == ("pocket", "float32", ())
    assert record.digest == open_checkpoint("pocket").digest()


def test_the_digest_of_the_model_does_not_depend_on_it(tmp_path: Path) -> None:
    for entry in POCKET.iterdir():
        if entry.name not in (GOLDEN_FILE, CASES_FILE, "cases"):
            (tmp_path / entry.name).symlink_to(entry)
    assert open_checkpoint(str(tmp_path)).digest() == open_checkpoint("pocket").digest()


def test_its_cases_are_those_of_the_folder(pocket_golden: Golden) -> None:
    for case, table in zip(pocket_golden.cases, read_cases(POCKET / CASES_FILE, MODEL), strict=True):
        record = case.record
        for key in ("name", "instruction", "negative", "seed", "steps", "guidance", "width", "height", "recorded"):
            assert getattr(record, key) == getattr(table, key), key
        assert [image.tobytes() for image in case.images] == [image.tobytes() for image in table.images]
    records = [case.record for case in pocket_golden.cases]
    assert [record.name for record in records] == NAMES
    assert any(record.width > record.height for record in records)
    assert any(record.width < record.height for record in records)
    assert {record.guidance > 1 for record in records} == {False, True}
    assert {record.images for record in records} == {1, 2}
    assert len({record.seed for record in records}) == len({r.instruction for r in records}) == len(records)
    assert [record.chain for record in records if record.chain] == [5]


def test_every_tensor_is_what_its_docstring_says(case: GoldenCase) -> None:
    """Shapes and dtypes; reading the file has compared those that depend on nothing but the description."""
    record, patch_width = case.record, 1176
    steps, noise = len(record.recorded), record.width * record.height // 256
    assert case.patches.shape == (case.grid_thw.prod(axis=1).sum(), patch_width)
    assert case.image_embeds.shape == (len(case.patches) // 4, MODEL.language.width)
    assert case.prompt_embeds.shape == (len(case.input_ids) - PREFIX_TOKENS, MODEL.language.width)
    assert (case.negative_embeds is None) == (case.negative_velocity is None) == (record.guidance <= 1)
    for array in (case.latents, case.latents_next, case.velocity):
        assert array.shape == (steps, noise, 64)
    for name, array in case.tensors.items():
        if array.dtype == np.float32:
            assert np.isfinite(array).all() and array.std() > 0, name
    for image in (case.edit, case.target, *case.chain):
        assert image is not None and image.size == (record.width, record.height)
    assert len(case.chain) == record.chain
    assert case.chain[:1] in ((), (case.edit,))


def test_the_inputs_are_the_runtimes(case: GoldenCase) -> None:
    prepared = [prepare(image, MODEL.areas) for image in case.images]
    for image, expected in zip(prepared, case.reference_images, strict=True):
        np.testing.assert_array_equal(image.vae, expected)
    vision = vision_inputs([image.vision for image in prepared], MODEL.processor)
    np.testing.assert_array_equal(np.array(vision.grids), case.grid_thw)
    tokens = encode(load_tokenizer(POCKET), [case.record.instruction], vision.grids, MODEL.prompt)
    np.testing.assert_array_equal(tokens.input_ids[0], case.input_ids)
    np.testing.assert_array_equal(tokens.position_ids[:, 0], case.position_ids)
    assert vision.patches.shape == case.patches.shape
    # the runtime has the patches in window order
    assert sorted(map(bytes, vision.patches.round(3))) == sorted(map(bytes, case.patches.round(3)))


def test_noise_and_sigmas_are_the_runtimes(case: GoldenCase) -> None:
    record = case.record
    rows, columns = record.height // 16, record.width // 16
    for dtype, found in (("float32", case.noise), ("bfloat16", case.noise_bfloat16)):
        shape = (1, 1, 16, 2 * rows, 2 * columns)
        noise = standard_normal(shape, seed=record.seed, dtype="float32" if dtype == "float32" else "bfloat16")
        packed = noise.reshape(16, rows, 2, columns, 2).transpose(1, 3, 0, 2, 4).reshape(-1, 64)
        np.testing.assert_array_equal(found, packed)
    schedule = sigmas(MODEL.scheduler, steps=record.steps, noise_tokens=rows * columns)
    np.testing.assert_array_equal(case.sigmas, schedule)


def test_targets_are_the_exact_answers(case: GoldenCase) -> None:
    (made,) = (made for made in CASES if made.name == case.record.name)
    size = (case.record.width, case.record.height)
    sources = [Source(image=np.asarray(resize(image, *size))) for image in case.images]
    np.testing.assert_array_equal(np.asarray(case.target), exact_result(made.instruction, *sources))


def test_the_reference_edits_well(case: GoldenCase) -> None:
    result, target = np.asarray(case.edit), np.asarray(case.target)
    before = np.asarray(resize(case.images[0], *case.edit.size))
    assert psnr_db(result, target) > 23
    assert psnr_db(result, target) > psnr_db(before, target) + 3
