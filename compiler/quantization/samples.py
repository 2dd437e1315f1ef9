"""Samples of edits for calibration: images and instructions become inputs of the transformer at many sigmas.

The model is a rectified flow: at sigma it reads (1 - sigma) * x + sigma * noise. For calibration x are the latents of
the input image itself, so that no trajectory has to be run.

Shape suffixes: H, W height and width in tokens, N = H * W noise tokens, L text tokens, C latent channels of a token, D
width of the prompt embeddings.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.quantization.block_weights import Readers
from qie.compiler.quantization.blockwise import Values, run
from qie.compiler.quantization.sample_modulation import SampleModulation
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.specs import DEFAULT_NEGATIVE, SIDE_MULTIPLE
from qie.engines.errors import CalibrationError
from qie.engines.inputs.feeds import encoder_feed, language_feed, transformer_feed, vision_feed
from qie.engines.inputs.image import load_image
from qie.engines.inputs.noise import standard_normal
from qie.engines.inputs.prepare import output_size, prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.vision import VisionInputs, vision_inputs
from qie.engines.progress import Progress

__all__ = [
    "NEGATIVE_EVERY",
    "CalibrationSample",
    "component_values",
    "digest",
    "draw_samples",
    "language_values",
    "prompt_values",
    "read_images",
    "sample_modulation",
    "step_values",
    "transformer_values",
    "vision_values",
]

ASPECTS = (None, 1.0, 16 / 9, 9 / 16)
"""Width by height to which images are cropped in turn; None leaves an image as it is."""

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")

NEGATIVE_EVERY = 4
"""Period of the samples of guidance's negative branch: the last of every four."""

STEPS = 40
"""Steps of the schedule from which sigmas are taken."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationSample:
    """One forward pass.

    Attributes:
        image: the input image.
        text: the instruction, or the negative prompt.
        position: position in the schedule, from 0 (its beginning) to 1.
        seed: seed of the noise.
    """

    image: Image.Image
    text: str
    position: float
    seed: int


def read_images(folder: Path, count: int) -> list[Image.Image]:
    """The first ``count`` images in ``folder``, sorted by name; ``draw_samples`` uses no more for as many samples.

    Raises:
        CalibrationError: the folder has no images.
        ImageError: an image cannot be read.
    """
    if not folder.is_dir():
        raise CalibrationError(f"there is no folder {folder}; name a folder of images like those to be edited")
    found = folder.iterdir()
    files = sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(
            f"{folder} has no images ({', '.join(SUFFIXES)}); name a folder of images like those to be edited"
        )
    return [load_image(file).image for file in files[:count]]


def draw_samples(
    images: Sequence[Image.Image], instructions: Sequence[str], count: int
) -> tuple[CalibrationSample, ...]:
    """``count`` samples that combine images, instructions, aspect ratios and sigmas in turn."""
    order = np.random.default_rng(0).permutation(count)
    return tuple(
        CalibrationSample(
            image=_cropped(images[i % len(images)], ASPECTS[(i // len(images)) % len(ASPECTS)]),
            text=DEFAULT_NEGATIVE if i % NEGATIVE_EVERY == NEGATIVE_EVERY - 1 else instructions[i % len(instructions)],
            position=(int(order[i]) + 0.5) / count,
            seed=i,
        )
        for i in range(count)
    )


def digest(samples: Sequence[CalibrationSample]) -> str:
    """sha256 (hex) of the content of ``samples``."""
    sha256 = hashlib.sha256()
    for sample in samples:
        sha256.update(f"{sample.image.size} {sample.text} {sample.position} {sample.seed}".encode())
        sha256.update(sample.image.tobytes())
    return sha256.hexdigest()


def vision_values(model: Model, samples: Sequence[CalibrationSample]) -> list[Values]:
    """The inputs of the vision tower for each sample."""
    return [vision_feed(_vision_inputs(model, sample)) for sample in samples]


def prompt_values(
    checkpoint: Checkpoint, samples: Sequence[CalibrationSample], vision: Sequence[Values]
) -> list[Values]:
    """The inputs of the language model for each sample, from the outputs of the vision tower."""
    tokenizer, model = load_tokenizer(checkpoint.path), checkpoint.model
    values: list[Values] = []
    for sample, outputs in zip(samples, vision, strict=True):
        grids = _vision_inputs(model, sample).grids
        tokens = encode(tokenizer, [sample.text], grids, model.prompt, allow_blank=True)
        values.append(language_feed(tokens, outputs["image_embeds"]))
    return values


def language_values(
    checkpoint: Checkpoint, readers: Readers, samples: Sequence[CalibrationSample], progress: Progress
) -> list[Values]:
    """The inputs of the language model for each sample; runs the vision tower."""
    vision = vision_values(checkpoint.model, samples)
    run(GRAPHS["vision"](checkpoint.model, "float32"), readers, vision, progress)
    return prompt_values(checkpoint, samples, vision)


def sample_modulation(model: Model, readers: Readers, samples: Sequence[CalibrationSample]) -> SampleModulation:
    """The modulation of each sample at its sigma."""
    return SampleModulation(model.transformer, readers["transformer"], _sigmas(model, samples))


def step_values(
    model: Model,
    readers: Readers,
    samples: Sequence[CalibrationSample],
    prompts_1LD: Sequence[NDArray[np.float32]],
    modulation: SampleModulation,
    progress: Progress,
) -> list[Values]:
    """The inputs of the transformer for each sample, whose prompt embeddings are ``prompts_1LD``.

    Runs the VAE's encoder. ``modulation`` is not computed yet.
    """
    encoded: list[Values] = [encoder_feed(prepare(s.image, model.areas).vae) for s in samples]
    run(GRAPHS["vae_encoder"](model, "float32"), readers, encoded, progress)
    values: list[Values] = []
    for number, (sample, sigma) in enumerate(zip(samples, _sigmas(model, samples), strict=True)):
        latents_1HWC = encoded[number].pop("latents")
        _, height, width, _ = latents_1HWC.shape
        x_1NC = latents_1HWC.reshape(1, height * width, -1)
        noise_1NC = standard_normal(x_1NC.shape, seed=sample.seed, dtype="float32")
        values.append(
            transformer_feed(
                latents_BNC=(np.float32(1 - sigma) * x_1NC + np.float32(sigma) * noise_1NC).astype(np.float32),
                reference_BRC=x_1NC,
                prompt_BLD=prompts_1LD[number],
                rotary=model.rotary,
                grids=[(height, width), (height, width)],
                modulation_YM=modulation.blocks[number],
                modulation_out_O=modulation.out[number],
                dsigma=-1 / STEPS,
            )
        )
    return values


def transformer_values(
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[CalibrationSample],
    prompts_1LD: Sequence[NDArray[np.float32]],
    progress: Progress,
) -> list[Values]:
    """The inputs of the transformer for each sample, whose prompt embeddings are ``prompts_1LD``.

    Runs the VAE's encoder and computes the modulation of every sigma.
    """
    modulation = sample_modulation(checkpoint.model, readers, samples)
    values = step_values(checkpoint.model, readers, samples, prompts_1LD, modulation, progress)
    modulation.compute(progress)
    return values


def component_values(
    component: Component,
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[CalibrationSample],
    progress: Progress,
) -> list[Values]:
    """The inputs of the language model or the transformer for each sample."""
    prompts = language_values(checkpoint, readers, samples, progress)
    if component == "language":
        return prompts
    run(GRAPHS["language"](checkpoint.model, "float32"), readers, prompts, progress)
    return transformer_values(checkpoint, readers, samples, [v["prompt_embeds"] for v in prompts], progress)


def _vision_inputs(model: Model, sample: CalibrationSample) -> VisionInputs:
    return vision_inputs([prepare(sample.image, model.areas).vision], model.processor)


def _sigmas(model: Model, samples: Sequence[CalibrationSample]) -> list[float]:
    """The sigma of each sample: that of its position in the schedule of an edit of its size."""
    found = []
    for sample in samples:
        width, height = output_size(sample.image.size, model.areas.vae_area)
        tokens = (width // SIDE_MULTIPLE) * (height // SIDE_MULTIPLE)
        found.append(float(sigmas(model.scheduler, steps=STEPS, noise_tokens=tokens)[int(sample.position * STEPS)]))
    return found


def _cropped(image: Image.Image, aspect: float | None) -> Image.Image:
    """The middle of ``image`` at ``aspect``, width by height."""
    if aspect is None:
        return image
    width, height = image.size
    new = (min(width, round(height * aspect)), min(height, round(width / aspect)))
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    return image.crop((left, top, left + new[0], top + new[1]))
