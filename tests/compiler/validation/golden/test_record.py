"""A recording holds what the reference computes, the same every time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.metrics.error import relative_l2
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden, open_golden
from qie.compiler.validation.golden.record import record_golden
from qie.compiler.validation.reference import Reference, load_reference
from qie.engines.errors import CheckpointError, GoldenError
from tests.support.images import smooth_image


@pytest.fixture(scope="module")
def recorded(checkpoint: Path, cases_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    reports: list[tuple[str, int, int]] = []
    path = tmp_path_factory.mktemp("recorded") / "golden"
    golden = record_golden(checkpoint, path, cases=cases_file, progress=lambda *report: reports.append(report))
    assert {what: (done, total) for what, done, total in reports if what in ("guided", "in a row", "modules")} == {
        "guided": (3, 3), "in a row": (4, 4), "modules": (5, 5),
    }  # fmt: skip
    return golden


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return load_reference(checkpoint)


def test_recording_is_deterministic(recorded: Golden, checkpoint: Path, cases_file: Path, tmp_path: Path) -> None:
    record_golden(checkpoint, tmp_path / "again", cases=cases_file)
    assert (tmp_path / "again").read_bytes() == recorded.path.read_bytes()


def test_the_description_is_that_of_the_edits(recorded: Golden, checkpoint: Path) -> None:
    record = recorded.record
    assert (record.model, record.dtype, record.loras) == ("tiny", "float32", ())
    assert record.digest == open_checkpoint(str(checkpoint)).digest()
    assert [name for name, _ in record.packages] == ["torch", "diffusers", "transformers"]
    guided, chained = record.cases
    assert (guided.recorded, guided.images, guided.target, guided.chain) == ((0, 2), 2, True, 0)
    assert (guided.width, guided.height, guided.guidance, guided.negative) == (96, 64, 3.0, "blurry")
    assert (chained.recorded, chained.images, chained.target, chained.chain) == ((0, 1), 1, False, 2)


def test_the_edit_is_the_pipelines(recorded: Golden, reference: Reference) -> None:
    case = recorded.cases[0]
    edited = reference.edit(
        case.images, "make it red", negative="blurry", cfg=3.0, steps=3, seed=5, width=96, height=64
    )  # the pipeline draws the same noise in float32
    np.testing.assert_array_equal(np.asarray(case.edit), edited)
    assert case.target is not None
    np.testing.assert_array_equal(np.asarray(case.target), np.asarray(smooth_image(96, 64, seed=2)))


def test_a_step_is_guidance_and_euler_of_its_velocities(recorded: Golden) -> None:
    case = recorded.cases[0]
    assert case.negative_velocity is not None
    for k, step in enumerate(case.record.recorded):
        plus, minus = case.velocity[k], case.negative_velocity[k]
        guided = minus + 3.0 * (plus - minus)
        guided *= np.linalg.norm(plus, axis=-1, keepdims=True) / np.linalg.norm(guided, axis=-1, keepdims=True)
        change = (case.sigmas[step + 1] - case.sigmas[step]) * guided
        assert relative_l2(case.latents_next[k] - case.latents[k], change) < 1e-5
        assert relative_l2(minus, plus) > 1e-3
    np.testing.assert_array_equal(case.latents_next[-1], case.final_latents)
    np.testing.assert_array_equal(case.latents[0], case.noise)


def test_without_guidance_there_is_no_negative_pass(recorded: Golden) -> None:
    case = recorded.cases[1]
    assert case.negative_embeds is None and case.negative_velocity is None
    np.testing.assert_array_equal(case.latents_next[0], case.latents[1])


def test_a_chain_edits_each_result_with_the_same_noise(recorded: Golden, reference: Reference) -> None:
    case = recorded.cases[1]
    np.testing.assert_array_equal(np.asarray(case.chain[0]), np.asarray(case.edit))
    size = {"width": case.record.width, "height": case.record.height}
    again = reference.edit(case.chain[:1], "make it blue", cfg=1.0, steps=2, latents=case.noise, **size)
    np.testing.assert_array_equal(np.asarray(case.chain[1]), again)


def test_bfloat16_starts_from_the_noise_of_float32(
    recorded: Golden, checkpoint: Path, cases_file: Path, tmp_path: Path
) -> None:
    golden = record_golden(checkpoint, tmp_path / "golden", cases=cases_file, dtype="bfloat16")
    case, exact = golden.cases[0], recorded.cases[0]
    assert golden.record.dtype == "bfloat16"
    np.testing.assert_array_equal(case.noise, exact.noise)
    assert 0 < relative_l2(case.latents[0], exact.noise) < 0.01
    assert 0 < relative_l2(case.velocity[0], exact.velocity[0]) < 0.1
    assert relative_l2(case.noise_bfloat16, case.noise) < 0.01


def test_a_model_of_one_image_is_recorded(cases_file: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny-edit", ARCHITECTURES["tiny-edit"], seed=1)
    text = cases_file.read_text().replace('["a.png", "b.png"]', '["a.png"]')
    for name in ("a.png", "b.png", "target.png"):
        (tmp_path / name).write_bytes((cases_file.parent / name).read_bytes())
    (tmp_path / "cases.toml").write_text(text)
    golden = record_golden(checkpoint, tmp_path / "golden", cases=tmp_path / "cases.toml")
    assert len(golden.cases[0].images) == 1


@pytest.mark.parametrize("method", ["encode_image", "prompt_embeds", "decode"])
def test_tensors_that_are_not_the_edits_are_not_written(
    method: str, checkpoint: Path, cases_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Reference, method)
    monkeypatch.setattr(Reference, method, lambda *given: original(*given)[::-1].copy())
    with pytest.raises(AssertionError, match="guided"):
        record_golden(checkpoint, tmp_path / "golden", cases=cases_file)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["photo.png", "none/golden", "."])
def test_nothing_else_is_replaced(name: str, workplace: Path, checkpoint: Path, cases_file: Path) -> None:
    before = Path("photo.png").read_bytes()
    with pytest.raises(GoldenError) as raised:
        record_golden(checkpoint, Path(name), cases=cases_file)
    assert raised.value.option == "out"
    assert Path("photo.png").read_bytes() == before


def test_a_missing_lora_is_refused_before_anything_runs(checkpoint: Path, cases_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors"):
        record_golden(checkpoint, tmp_path / "golden", cases=cases_file, loras=["none.safetensors"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_shipped_file_is_what_a_fresh_recording_holds(pocket_golden: Golden, tmp_path: Path) -> None:
    fresh = record_golden("pocket", tmp_path / GOLDEN_FILE)
    assert replace(fresh.record, tensors="", packages=()) == replace(pocket_golden.record, tensors="", packages=())
    for case, shipped in zip(fresh.cases, pocket_golden.cases, strict=True):
        assert case.tensors.keys() == shipped.tensors.keys()
        for name, array in case.tensors.items():
            if array.dtype == np.float32:
                assert relative_l2(array, shipped.tensors[name]) < 1e-5, name
            elif array.dtype == np.int64:
                np.testing.assert_array_equal(array, shipped.tensors[name], name)
        np.testing.assert_array_equal(case.patches, shipped.patches)
        np.testing.assert_array_equal(case.reference_images, shipped.reference_images)
        for image, expected in zip((case.edit, *case.chain), (shipped.edit, *shipped.chain), strict=True):
            assert most_different(image, expected) <= 1
    for component, samples in fresh.modules.items():
        for name, values in samples.items():
            assert relative_l2(values, pocket_golden.modules[component][name]) < 1e-5, name
    assert open_golden(POCKET / GOLDEN_FILE).record == pocket_golden.record


def most_different(image: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).max())
