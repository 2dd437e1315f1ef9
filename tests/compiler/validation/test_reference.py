"""The methods of the reference compose to diffusers' own edit, and it corrects the positions that diffusers loses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.compiler.validation.reference import Reference, ReferenceStep, load_reference, randn
from qie.engines.errors import BackendMissingError, CheckpointError, RequestError
from tests.support.images import smooth_image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

GENERATIONS = ("tiny-edit", "tiny-2509", "tiny")
INSTRUCTION = "Make the sky red, please"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_checkpoint(path, ARCHITECTURES[name])

    return get


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Reference]:
    loaded: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in loaded:
            loaded[name] = load_reference(checkpoint(name))
        return loaded[name]

    return get


def images(name: str) -> list[Image.Image]:
    return [smooth_image(200, 150)] if name == "tiny-edit" else [smooth_image(200, 150), smooth_image(90, 160, seed=1)]


@pytest.mark.parametrize("name", GENERATIONS)
def test_an_edit_has_the_checkpoints_area_and_depends_on_the_seed(
    name: str, reference: Callable[[str], Reference]
) -> None:
    loaded = reference(name)
    edited = loaded.edit(images(name), INSTRUCTION, steps=2, seed=0)
    assert edited.dtype == np.uint8
    assert edited.shape == {"tiny-edit": (96, 160, 3)}.get(name, (160, 96, 3))
    assert 20 < edited.std() < 100
    np.testing.assert_array_equal(edited, loaded.edit(images(name), INSTRUCTION, steps=2, seed=0))
    assert (edited != loaded.edit(images(name), INSTRUCTION, steps=2, seed=1)).mean() > 0.5
    assert (edited != loaded.edit(images(name), INSTRUCTION, steps=2, seed=0, cfg=1.0)).mean() > 0.5
    assert loaded.edit(images(name), INSTRUCTION, steps=2, seed=0, width=64, height=48).shape == (48, 64, 3)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_methods_compose_to_the_edit(name: str, reference: Callable[[str], Reference]) -> None:
    loaded, steps = reference(name), list[ReferenceStep]()
    edited = loaded.edit(images(name), INSTRUCTION, negative="blurry", cfg=3.0, steps=3, seed=5, on_step=steps.append)

    resized = [loaded.reference_image(image) for image in images(name)]
    latents_BRC = [loaded.encode_image(image)[None] for image in resized]
    grid = (edited.shape[0] // 16, edited.shape[1] // 16)
    grids = [grid, *((image.shape[0] // 16, image.shape[1] // 16) for image in resized)]
    positive_BLD = loaded.prompt_embeds(images(name), INSTRUCTION)[None]
    negative_BLD = loaded.prompt_embeds(images(name), "blurry")[None]
    noise = randn((1, 1, 16, 2 * grid[0], 2 * grid[1]), seed=5)
    latents_NC = noise.reshape(16, grid[0], 2, grid[1], 2).transpose(1, 3, 0, 2, 4).reshape(-1, 64)

    assert [step.index for step in steps] == [0, 1, 2]
    for step in steps:
        np.testing.assert_allclose(step.latents, latents_NC, atol=1e-4)
        positive, negative = (
            loaded.velocity(latents_NC[None], latents_BRC, embeds_BLD, step.sigma, grids)[0]
            for embeds_BLD in (positive_BLD, negative_BLD)
        )
        combined = negative + 3.0 * (positive - negative)
        lengths = [np.linalg.norm(velocity, axis=-1, keepdims=True) for velocity in (positive, combined)]
        velocity_NC = combined * lengths[0] / lengths[1]
        np.testing.assert_allclose(step.velocity, velocity_NC, atol=1e-3)
        sigma_next = steps[step.index + 1].sigma if step.index < 2 else 0.0
        latents_NC = latents_NC + np.float32(sigma_next - step.sigma) * velocity_NC
        np.testing.assert_allclose(step.latents_next, latents_NC, atol=1e-4)
    assert steps[-1].sigma == pytest.approx(0.02)
    np.testing.assert_array_equal(loaded.decode(steps[-1].latents_next, *grid), edited)


def test_given_latents_replace_the_seed(reference: Callable[[str], Reference]) -> None:
    loaded, steps = reference("tiny"), list[ReferenceStep]()
    edited = loaded.edit(images("tiny"), INSTRUCTION, steps=2, seed=3, on_step=steps.append)
    again = loaded.edit(images("tiny"), INSTRUCTION, steps=2, latents=steps[0].latents)
    np.testing.assert_array_equal(edited, again)


def test_a_batch_is_its_rows(reference: Callable[[str], Reference]) -> None:
    loaded, grids = reference("tiny"), [(4, 6), (5, 3), (2, 2)]
    latents_BNC, first_BRC, second_BRC = (randn((2, h * w, 64), seed=h) for h, w in grids)
    embeds_BLD = randn((2, 9, 64), seed=0)
    both = loaded.velocity(latents_BNC, [first_BRC, second_BRC], embeds_BLD, 0.7, grids)
    assert both.shape == latents_BNC.shape
    for row in (slice(0, 1), slice(1, 2)):
        alone = loaded.velocity(latents_BNC[row], [first_BRC[row], second_BRC[row]], embeds_BLD[row], 0.7, grids)
        np.testing.assert_allclose(both[row], alone, atol=1e-5)


@pytest.mark.parametrize("name", GENERATIONS)
def test_image_positions_reach_the_text_encoder(name: str, reference: Callable[[str], Reference]) -> None:
    loaded = reference(name)
    encoder, prompt = loaded.pipeline.text_encoder, loaded.prompt(images(name), INSTRUCTION)
    inputs = {
        "input_ids": torch.from_numpy(prompt.input_ids)[None],
        "pixel_values": torch.from_numpy(prompt.patches),
        "image_grid_thw": torch.from_numpy(prompt.grid_thw),
        "output_hidden_states": True,
    }
    along_text = torch.arange(len(prompt.input_ids)).expand(3, 1, -1)

    def embeds(**positions: Any) -> np.ndarray[Any, Any]:
        hidden = encoder.forward(**inputs, **positions).hidden_states[-1]  # forward itself, so no hook mends the inputs
        return np.asarray(hidden[0, 64:])

    np.testing.assert_allclose(prompt.embeds, embeds(position_ids=torch.from_numpy(prompt.position_ids)[:, None]))
    np.testing.assert_allclose(embeds(), embeds(position_ids=along_text))
    assert np.linalg.norm(prompt.embeds - embeds()) > 0.01 * np.linalg.norm(prompt.embeds)

    is_image = prompt.input_ids == encoder.config.image_token_id
    _, height, width = prompt.grid_thw[0] // 2
    first = np.flatnonzero(is_image)[0]
    image_positions = prompt.position_ids[:, first : first + height * width] - first
    np.testing.assert_array_equal(image_positions[0], 0)
    np.testing.assert_array_equal(image_positions[1:].reshape(2, height, width), np.indices((height, width)))
    assert is_image.sum() == (prompt.grid_thw.prod(axis=1) // 4).sum()


def test_vision_is_what_the_prompt_holds(reference: Callable[[str], Reference]) -> None:
    loaded = reference("tiny")
    prompt = loaded.prompt(images("tiny"), INSTRUCTION)
    features = loaded.pipeline.text_encoder.model.get_image_features(
        torch.from_numpy(prompt.patches), torch.from_numpy(prompt.grid_thw)
    )
    embeds_VD = loaded.vision(prompt.patches, prompt.grid_thw)
    assert embeds_VD.shape == (len(prompt.patches) // 4, 64)
    np.testing.assert_array_equal(embeds_VD, torch.cat(features.pooler_output).numpy())


def test_the_last_hidden_state_is_past_the_final_norm(reference: Callable[[str], Reference]) -> None:
    loaded = reference("tiny")
    decoder = loaded.pipeline.text_encoder.model.language_model
    outputs: list[Any] = []
    handle = decoder.layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        prompt = loaded.prompt(images("tiny"), INSTRUCTION)
    finally:
        handle.remove()
    np.testing.assert_array_equal(prompt.embeds, decoder.norm(outputs[0])[0, 64:].numpy())
    assert not np.allclose(prompt.embeds, outputs[0][0, 64:].numpy(), atol=0.1)


def test_the_areas_do_not_leak(reference: Callable[[str], Reference]) -> None:
    loaded = reference("tiny")
    module = sys.modules[type(loaded.pipeline).__module__]
    before, step = module.calculate_dimensions, loaded.pipeline.scheduler.step

    def stop(_: ReferenceStep) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loaded.edit(images("tiny"), INSTRUCTION, steps=2, seed=0, on_step=stop)
    assert module.calculate_dimensions is before
    assert loaded.pipeline.scheduler.step == step
    assert before(1024 * 1024, 1.0) == (1024, 1024)


def test_areas_are_the_published_ones_without_a_note(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("tiny")
    index = json.loads((folder / "model_index.json").read_text())
    own = index.pop("_qie")
    assert {key: own[key] for key in ("vae_area", "condition_area")} == dict.fromkeys(
        ("vae_area", "condition_area"), 128 * 128
    )
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = load_reference(tmp_path)
    assert (loaded.vae_area, loaded.condition_area) == (1024 * 1024, 384 * 384)
    assert loaded.reference_image(smooth_image(64, 64)).shape == (1024, 1024, 3)


def test_bfloat16_is_close_to_float32(checkpoint: Callable[[str], Path], reference: Callable[[str], Reference]) -> None:
    exact, rounded = reference("tiny"), load_reference(checkpoint("tiny"), dtype="bfloat16")
    assert {parameter.dtype for parameter in rounded.pipeline.transformer.parameters()} == {torch.bfloat16}
    pairs = [
        (
            loaded.prompt_embeds(images("tiny"), INSTRUCTION),
            loaded.encode_image(loaded.reference_image(smooth_image(90, 90))),
        )
        for loaded in (exact, rounded)
    ]
    for expected, value in zip(*pairs, strict=True):
        assert value.dtype == np.float32
        assert 0 < np.linalg.norm(value - expected) < 0.1 * np.linalg.norm(expected)
    assert rounded.edit(images("tiny"), INSTRUCTION, steps=2, seed=0).shape == (160, 96, 3)


def test_randn_is_torchs() -> None:
    expected = torch.randn((2, 3, 5), generator=torch.Generator("cpu").manual_seed(7))
    np.testing.assert_array_equal(randn((2, 3, 5), 7), expected.numpy())
    assert len(np.unique(randn((64, 64), 7, "bfloat16"))) < 4096 == len(np.unique(randn((64, 64), 7)))


def test_noise_comes_from_exactly_one_place(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(RequestError, match="give one of the two"):
        reference("tiny").edit(images("tiny"), INSTRUCTION, steps=2)
    with pytest.raises(RequestError, match="give one of the two"):
        reference("tiny").edit(images("tiny"), INSTRUCTION, steps=2, seed=0, latents=np.zeros((60, 64), np.float32))


def test_edit_takes_one_image(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(RequestError, match="2 images were given, this model takes 1; use one"):
        reference("tiny-edit").edit(images("tiny"), INSTRUCTION, steps=2, seed=0)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no model_index.json; name a checkpoint"):
        load_reference(tmp_path)
    tiny = write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"], weights=False)
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        load_reference(tmp_path)


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_a_missing_package_says_what_to_install(
    package: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendMissingError, match=rf"{package} is not installed.*run `pip install 'qie\[reference\]'"):
        load_reference(checkpoint("tiny"))


def test_importing_it_needs_none_of_them() -> None:
    code = (
        "import sys, qie.compiler.validation.reference; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
