"""Fixtures of the tests of vLLM: the stand-in package, bundles for it, and inputs."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PromptTokens, encode
from qie.engines.inputs.vision import VisionInputs, vision_inputs
from qie.engines.sessions.vllm.engine import ENVIRONMENT
from tests.support.bundles import build
from tests.support.images import smooth_image

PACKAGE = Path(__file__).parents[3] / "support" / "vllm" / "package"

BOTH = """
extends = "cpu"
[components.vision]
backend = "vllm"
[components.language]
backend = "vllm"
"""

Inputs = Callable[..., tuple[VisionInputs, list[PromptTokens]]]


@pytest.fixture(scope="session")
def vllm_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the small checkpoint whose text encoder vLLM runs; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("vllm") / "tiny-vllm", BOTH).path


@pytest.fixture
def vllm(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's class ``LLM``, computing with the bundle for the CPU."""
    monkeypatch.syspath_prepend(PACKAGE)
    before = set(sys.modules)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        del os.environ[name]
    import vllm

    vllm.LLM.reference, vllm.LLM.opened, vllm.LLM.fails = bundle, [], None
    yield vllm.LLM
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "vllm":
            del sys.modules[name]


@pytest.fixture(scope="session")
def inputs(bundle: Path) -> Inputs:
    """Makes the inputs of an edit of several images of different shapes."""
    opened = open_bundle(bundle)
    model, tokenizer = opened.manifest.model, open_tokenizer(opened)

    def make(images: int = 2, *instructions: str) -> tuple[VisionInputs, list[PromptTokens]]:
        sizes = [(150, 90), (60, 120), (80, 80)]
        pictures: list[Image.Image] = [smooth_image(*sizes[n], n) for n in range(images)]
        vision = vision_inputs([prepare(picture, model.areas).vision for picture in pictures], model.vision)
        words = instructions or ("make it red",)
        return vision, [encode(tokenizer, [text], vision.grids, model.prompt, allow_blank=True) for text in words]

    return make
