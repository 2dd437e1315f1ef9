"""Feeds: the inputs of every graph, by name, dtype and shape."""

from pathlib import Path

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import GRAPHS
from qie.engines.bundle.manifest import COMPONENTS, Component, TensorSpec
from qie.engines.inputs.feeds import (
    SCHEDULE_INPUTS,
    Feed,
    decoder_feed,
    encoder_feed,
    guidance_feed,
    language_feed,
    latents_feed,
    schedule_feed,
    step_feed,
    text_feed,
    transformer_feed,
    vision_feed,
)
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PromptTokens
from qie.engines.inputs.rotary import rotary_tables
from qie.engines.inputs.vision import vision_inputs
from tests.support.images import smooth_image

BATCH, TEXT, GRIDS = 2, 5, ((2, 3), (4, 2))
NOISE, REFERENCE = (height * width for height, width in GRIDS)
NEGATIVE = np.full((BATCH, NOISE, 64), 7, np.float32)
LATENTS, REFERENCES = np.zeros((BATCH, NOISE, 64), np.float32), np.ones((BATCH, REFERENCE, 64), np.float32)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return open_checkpoint(str(checkpoint)).model


def inputs_of(model: Model, component: Component) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in GRAPHS[component](model, "float32").inputs}


def transformer(model: Model, negative: np.ndarray | None = None, guidance: float = 1.0) -> Feed:
    specs = inputs_of(model, "transformer")
    values, of_output = (int(specs[name].dims[1]) for name in ("modulation", "modulation_out"))
    return transformer_feed(
        latents_BNC=LATENTS,
        reference_BRC=REFERENCES,
        prompt_BLD=np.zeros((BATCH, TEXT, int(specs["prompt_embeds"].dims[-1])), np.float32),
        rotary=model.rotary,
        grids=GRIDS,
        modulation_YM=np.zeros((model.transformer.layers, values), np.float32),
        modulation_out_O=np.zeros(of_output, np.float32),
        dsigma=-0.25,
        negative_velocity_BNC=negative,
        guidance=guidance,
    )


def feed_of(model: Model, component: Component) -> Feed:
    match component:
        case "vision":
            images = [prepare(smooth_image(*size), model.areas).vision for size in ((150, 90), (60, 80))]
            return vision_feed(vision_inputs(images, model.processor))
        case "language":
            ids = np.zeros((BATCH, TEXT), np.int64)
            positions = np.zeros((3, BATCH, TEXT), np.int64)
            tokens = PromptTokens(input_ids=ids, image_index=ids - 1, position_ids=positions, lengths=(TEXT, TEXT))
            width = int(inputs_of(model, "language")["image_embeds"].dims[-1])
            return language_feed(tokens, np.zeros((4, width), np.float32))
        case "vae_encoder":
            return encoder_feed(np.zeros((32, 48, 3), np.uint8))
        case "vae_decoder":
            return decoder_feed(np.zeros((2, 3, 64), np.float32))
        case _:
            return transformer(model)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_feed_is_what_the_graph_reads(model: Model, component: Component) -> None:
    """Equal names and dtypes, fixed dims, and one size for each free dim."""
    specs, feed = inputs_of(model, component), feed_of(model, component)
    assert feed.keys() == specs.keys()
    sizes: dict[str, int] = {}
    for name, array in feed.items():
        assert array.dtype == specs[name].dtype, name
        assert array.ndim == len(specs[name].dims), name
        for dim, size in zip(specs[name].dims, array.shape, strict=True):
            expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            assert size == expected, f"{dim} of {name}"


def test_the_transformers_eleven_inputs_are_the_five_parts(model: Model) -> None:
    feed = transformer(model)
    prompt = feed["prompt_embeds"]
    parts = (
        latents_feed(LATENTS, REFERENCES),
        text_feed(prompt, model.rotary, GRIDS),
        schedule_feed(feed["modulation"][None], feed["modulation_out"], feed["dsigma"]),
        step_feed([0] * BATCH),
        guidance_feed(LATENTS, [1.0] * BATCH),
    )
    assert [name for part in parts for name in part] == list(feed)
    assert len(feed) == 11
    assert tuple(parts[2]) == SCHEDULE_INPUTS


def test_the_rotary_tables_follow_the_prompt(model: Model) -> None:
    feed = transformer(model)
    cos_TA, sin_TA = rotary_tables(model.rotary, text_tokens=TEXT, grids=GRIDS)
    assert np.array_equal(feed["rotary_cos"], cos_TA) and np.array_equal(feed["rotary_sin"], sin_TA)
    assert len(cos_TA) == TEXT + NOISE + REFERENCE


def test_a_pass_without_guidance_gets_zeros_and_one(model: Model) -> None:
    feed = transformer(model)
    assert not feed["negative_velocity"].any() and feed["negative_velocity"].shape == LATENTS.shape
    assert feed["guidance"].tolist() == [1.0] * BATCH
    assert feed["dsigma"].tolist() == [-0.25]


def test_a_guided_pass_gets_the_negative_velocity_and_the_scale(model: Model) -> None:
    feed = transformer(model, NEGATIVE, 4.0)
    assert np.array_equal(feed["negative_velocity"], NEGATIVE)
    assert feed["guidance"].tolist() == [4.0] * BATCH
