"""The real vLLM in this process against the graphs with onnxruntime: vision, language and whole edits."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qie.compiler.metrics.error import psnr_db
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import EngineError
from qie.engines.inputs.feeds import language_feed, vision_feed
from qie.engines.sessions.vllm.engine import open_engine
from qie.engines.sessions.vllm.prompt import raster_patches, read_prompt, vision_grids
from tests.support.repository import ROOT
from tests.vllm.conftest import Inputs, relative

Measured = Callable[[str], None]


@pytest.fixture(scope="module")
def stages(with_vllm: Bundle) -> Iterator[Stages]:
    stages = Stages(with_vllm, residency="resident")
    yield stages
    stages.close()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_vision_equals_the_graph(
    images: int, stages: Stages, plain: Stages, inputs: Inputs, measured: Measured
) -> None:
    vision, _ = inputs(images)
    error = relative(stages.vision(vision), plain.vision(vision))
    measured(f"relative L2 {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("images", [1, 2, 3])
def test_language_equals_the_graph(
    images: int, stages: Stages, plain: Stages, inputs: Inputs, measured: Measured
) -> None:
    vision, prompts = inputs(images)
    embeds = plain.vision(vision)
    expected, found = plain.language(prompts, embeds), stages.language(prompts, embeds)
    errors = [relative(one, other) for one, other in zip(found, expected, strict=True)]
    largest = max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))
    measured(f"relative L2 {max(errors):.1e}, largest difference {largest:.1e}")
    assert max(errors) < 1e-4 and largest < 1e-3


def test_a_longer_prompt_than_the_first_is_computed_from_its_beginning(
    stages: Stages, plain: Stages, inputs: Inputs
) -> None:
    vision, prompts = inputs(2)
    embeds = plain.vision(vision)
    twice = [prompts[0], prompts[0], prompts[2]]  # a prefix cache would keep what these share
    for found, expected in zip(stages.language(twice, embeds), plain.language(twice, embeds), strict=True):
        assert found.shape == expected.shape and relative(found, expected) < 1e-4


def test_bfloat16_is_near(stages: Stages, with_vllm: Bundle, plain: Stages, inputs: Inputs, measured: Measured) -> None:
    stages.close()  # a process takes one engine
    vision, prompts = inputs(2)
    embeds = plain.vision(vision)
    engine, give_back = open_engine(with_vllm.path / "text_encoder.vllm", "bfloat16", None, 0)
    try:
        feed = vision_feed(vision)
        tower = relative(engine.image_embeds(raster_patches(feed), vision_grids(feed)), embeds)
        settings = engine.settings
        prompt = read_prompt(
            language_feed(prompts[0], embeds), image_token_id=settings.image_token_id, merge_size=settings.merge_size
        )
        (expected,) = plain.language([prompts[0]], embeds)
        hidden = engine.hidden_states(prompt)
        language = relative(hidden[len(hidden) - expected.shape[1] :], expected[0])
    finally:
        give_back()
    measured(f"relative L2: vision {tower:.1e}, language {language:.1e}")
    assert tower < 0.03 and language < 0.1  # transformers in bfloat16: 0.059 for the same prompt


@pytest.mark.parametrize("photos", [PHOTO := ("docs/images/cat.jpg",), (*PHOTO, "recipes/pocket/cases/wide.png")])
def test_an_edit_equals_that_of_the_graphs(
    photos: tuple[str, ...], with_vllm: Bundle, pocket_bundle: Path, measured: Measured
) -> None:
    images = [Image.open(ROOT / photo).convert("RGB") for photo in photos]
    request = Request(images=images, instructions=["tint it purple"], seeds=[1], guidance=2.0)
    results = []
    for bundle in (open_bundle(pocket_bundle), with_vllm):
        with Editor(bundle, residency="sequential") as editor:
            results.append(np.asarray(editor.edit(request).images[0]))
    found = psnr_db(results[1], results[0])
    measured(f"{len(photos)} images: PSNR {found:.1f} dB, {(results[0] != results[1]).mean():.2%} of the values differ")
    assert found > 50


def test_an_expanded_prompt_is_refused(with_vllm: Bundle, stages: Stages, plain: Stages, inputs: Inputs) -> None:
    """The real one expands the first token of a run again and says nothing, as the stand-in does."""
    vision, prompts = inputs(1)
    embeds = plain.vision(vision)
    stages.vision(vision)
    engine, give_back = open_engine(with_vllm.path / "text_encoder.vllm", "float32", None, 0)
    try:
        settings = engine.settings
        prompt = read_prompt(
            language_feed(prompts[0], embeds), image_token_id=settings.image_token_id, merge_size=settings.merge_size
        )
        prompt.token_ids[:] = prompt.expanded_ids
        with pytest.raises(EngineError, match=r"vLLM computed \d+ hidden states of a prompt of \d+ tokens"):
            engine.hidden_states(prompt)
    finally:
        give_back()
