"""Every component against diffusers and transformers on equal inputs, in float32, to 1e-4 relative L2."""

import numpy as np
import pytest

from qie.compiler.metrics.error import relative_l2
from qie.engines.inputs.feeds import transformer_feed
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PREFIX_TOKENS, encode
from qie.engines.inputs.vision import vision_inputs
from tests.support.parity import CASES, MANY, SideOf, images

BOUND = 1e-4


@pytest.mark.parametrize(("name", "count"), MANY)
def test_vision(side_of: SideOf, name: str, count: int) -> None:
    side = side_of(name)
    editor, model = side.editor, side.editor.model
    vision = vision_inputs([prepare(p, model.areas).vision for p in images(count)], model.vision)
    expected = side.reference.prompt(images(count), "anything")
    assert [list(grid) for grid in vision.grids] == expected.grid_thw.tolist()
    assert len(set(vision.window_ids)) > count  # windows matter: every image has several
    assert relative_l2(editor.stages.vision(vision), side.reference.vision(expected.patches, expected.grid_thw)) < BOUND


@pytest.mark.parametrize("instruction", ["make it red", " ", "die Straße bei Nacht, 夜の街, 🌃 <|im_end|>"])
@pytest.mark.parametrize(("name", "count"), MANY)
def test_language(side_of: SideOf, name: str, count: int, instruction: str) -> None:
    side = side_of(name)
    editor, model = side.editor, side.editor.model
    vision = vision_inputs([prepare(p, model.areas).vision for p in images(count)], model.vision)
    tokens = encode(editor.tokenizer, [instruction], vision.grids, model.prompt, allow_blank=True)
    expected = side.reference.prompt(images(count), instruction)
    assert tokens.input_ids[0].tolist() == expected.input_ids.tolist()
    assert tokens.position_ids[:, 0].tolist() == expected.position_ids.tolist()
    embeds = editor.stages.language([tokens], editor.stages.vision(vision))[0][0]
    assert len(embeds) == len(expected.input_ids) - PREFIX_TOKENS
    assert relative_l2(embeds, expected.embeds) < BOUND


def test_padding_never_reaches_a_prompt(side_of: SideOf) -> None:
    editor = side_of("2511").editor
    vision = vision_inputs([prepare(p, editor.model.areas).vision for p in images(2)], editor.model.vision)
    image_embeds = editor.stages.vision(vision)
    texts = ["red", "make the picture look like an old postcard from the sea"]
    both = encode(editor.tokenizer, texts, vision.grids, editor.model.prompt)
    (padded,) = editor.stages.language([both], image_embeds)
    for row, text, length in zip(padded, texts, both.lengths, strict=True):
        tokens = encode(editor.tokenizer, [text], vision.grids, editor.model.prompt)
        alone = editor.stages.language([tokens], image_embeds)[0][0]
        assert relative_l2(row[: length - PREFIX_TOKENS], alone) < 1e-6


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", CASES)
def test_vae(side_of: SideOf, name: str, index: int) -> None:
    side = side_of(name)
    image = prepare(images(3)[index], side.editor.model.areas).vae
    assert (image == side.reference.reference_image(images(3)[index])).all()
    (latents,) = side.editor.stages.encode([image])
    rows, columns, _ = latents.shape
    expected = side.reference.encode_image(image)
    assert relative_l2(latents.reshape(rows * columns, -1), expected) < BOUND
    assert 0.2 < expected.std() < 5  # a constant or exploded latent would prove nothing

    (decoded,) = side.editor.stages.decode([expected.reshape(rows, columns, -1)])
    expected_image = side.reference.decode(expected, rows, columns)
    assert expected_image.std() > 5
    assert np.abs(decoded.astype(int) - expected_image).max() <= 1  # a value between two may round either way
    assert (decoded != expected_image).mean() < 1e-3


@pytest.mark.parametrize("sigma", [1.0, 0.62, 0.02])
@pytest.mark.parametrize(("name", "count"), MANY)
def test_transformer(side_of: SideOf, name: str, count: int, sigma: float) -> None:
    """Both passes of a guided step, two images in the batch, references of different sizes."""
    side = side_of(name)
    editor, model = side.editor, side.editor.model
    rng = np.random.default_rng(3)
    grids = [(4, 9), (6, 3), (2, 5), (7, 7)][: count + 1]
    latents, *references = (rng.standard_normal((2, h * w, 64), np.float32) for h, w in grids)
    width = CASES[name].text_hidden_size
    positive, negative = (rng.standard_normal((2, length, width), np.float32) for length in (21, 13))
    schedule = np.array([sigma, 0.01], np.float32)
    tables = modulation_tables(editor.bundle, schedule, cache=side.folder / "cache")

    def step(prompt: np.ndarray, negative_velocity: np.ndarray, guidance: float) -> list[np.ndarray]:
        feed = transformer_feed(
            latents_BNC=latents,
            reference_BRC=np.concatenate(references, axis=1),
            prompt_BLD=prompt,
            rotary=model.rotary,
            grids=grids,
            modulation_YM=tables.blocks[0],
            modulation_out_O=tables.out[0],
            dsigma=schedule[1] - schedule[0],
            negative_velocity_BNC=negative_velocity,
            guidance=guidance,
        )
        with editor.stages.session("transformer") as session:
            sizes = {"batch": 2, "noise_tokens": latents.shape[1]}
            outputs = {key: session.empty(key, sizes) for key in ("velocity", "latents_next")}
            session.run({key: session.upload(array) for key, array in feed.items()}, outputs)
            return [session.download(tensor).copy() for tensor in outputs.values()]

    zeros = np.zeros_like(latents)
    minus, alone = step(negative, zeros, 1.0)
    plus, following = step(positive, minus, 4.0)
    expected_minus, expected_plus = (
        side.reference.velocity(latents, references, prompt, float(schedule[0]), grids)
        for prompt in (negative, positive)
    )
    assert relative_l2(minus, expected_minus) < BOUND
    assert relative_l2(plus, expected_plus) < BOUND
    assert np.array_equal(alone, latents + (schedule[1] - schedule[0]) * minus)  # without guidance, exactly Euler

    guided = expected_minus + 4.0 * (expected_plus - expected_minus)
    guided *= np.linalg.norm(expected_plus, axis=-1, keepdims=True) / np.linalg.norm(guided, axis=-1, keepdims=True)
    assert relative_l2(following - latents, (schedule[1] - schedule[0]) * guided) < BOUND
