"""Samples of edits for calibration: pictures and instructions become what the transformer reads, at many sigmas.

The model is a rectified flow: at sigma it sees (1 - sigma) * x + sigma * noise. For calibration x are a picture's own
latents, so that no trajectory has to be run.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.quantization.blockwise import Segment, Values, run_segments, segments
from qie.compiler.weights.modulation import write_modulation
from qie.engines.bundle.manifest import Component
from qie.engines.errors import CalibrationError
from qie.engines.inputs.feeds import encoder_feed, language_feed, transformer_feed, vision_feed
from qie.engines.inputs.image import load_image, prepare
from qie.engines.inputs.modulation import compute_tables
from qie.engines.inputs.noise import standard_normal
from qie.engines.inputs.prompt import DEFAULT_NEGATIVE, encode
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.vision import vision_inputs

__all__ = [
    "INSTRUCTIONS",
    "NEGATIVE",
    "Sample",
    "digest",
    "draw_samples",
    "language_values",
    "read_images",
    "run",
    "transformer_values",
    "values_of",
]

INSTRUCTIONS = (
    "make it grayscale",
    "change the background to a beach at sunset",
    "put a red hat on the person",
    "turn it into a watercolor painting",
    "remove the text",
    "make it night",
    "add a small dog on the left",
    'write "OPEN" on the sign',
)
"""What is asked for where nobody says what."""

ASPECTS = (None, 1.0, 16 / 9, 9 / 16)
"""Width by height to which pictures are cropped by turns; None leaves one as it is."""

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")

NEGATIVE = 4
"""Every so many samples, one is of guidance's negative branch."""

STEPS = 40
"""Sigmas are those of a schedule of so many steps."""

Readers = Mapping[Subfolder, TensorReader]
Progress = Callable[[str, int, int], None]
Observer = Callable[[Segment, int, Values], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One forward pass: a picture, a prompt, and a share of the schedule from 0, where it begins, to 1."""

    image: Image.Image
    text: str
    share: float
    seed: int


def read_images(folder: Path) -> list[Image.Image]:
    """The pictures in ``folder``, in the order of their names.

    Raises:
        CalibrationError: there is none, or one cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise CalibrationError(
            f"{folder} has no pictures ({', '.join(SUFFIXES)}); name a folder of pictures like those to be edited"
        )
    return [load_image(file).image for file in files]


def draw_samples(images: Sequence[Image.Image], instructions: Sequence[str], count: int) -> tuple[Sample, ...]:
    """``count`` samples: pictures, instructions, aspects and sigmas by turns, so that each meets many of the others."""
    order = np.random.default_rng(0).permutation(count)
    return tuple(
        Sample(
            image=_cropped(images[i % len(images)], ASPECTS[(i // len(images)) % len(ASPECTS)]),
            text=DEFAULT_NEGATIVE if i % NEGATIVE == NEGATIVE - 1 else instructions[i % len(instructions)],
            share=(int(order[i]) + 0.5) / count,
            seed=i,
        )
        for i in range(count)
    )


def digest(samples: Sequence[Sample]) -> str:
    """sha256 (hex) of everything in ``samples``."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(f"{sample.image.size} {sample.text} {sample.share} {sample.seed}".encode())
        found.update(sample.image.tobytes())
    return found.hexdigest()


def language_values(
    checkpoint: Checkpoint, readers: Readers, samples: Sequence[Sample], progress: Progress
) -> list[Values]:
    """What the language model reads of each sample; the vision tower runs for it."""
    model = checkpoint.model
    tokenizer, spec, sizes = load_tokenizer(checkpoint.path), model.prompt, model.areas
    seen = [vision_inputs([prepare(s.image, sizes).vision], model.processor) for s in samples]
    towers: list[Values] = [vision_feed(inputs) for inputs in seen]
    run(GRAPHS["vision"](checkpoint.model, "float32"), readers, towers, progress)
    values: list[Values] = []
    for sample, grids, tower in zip(samples, (s.grids for s in seen), towers, strict=True):
        tokens = encode(tokenizer, [sample.text], grids, spec, allow_blank=True)
        values.append(language_feed(tokens, tower["image_embeds"]))
    return values


def transformer_values(
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[Sample],
    prompts: Sequence[NDArray[np.float32]],
    progress: Progress,
) -> list[Values]:
    """What the transformer reads of each sample, whose prompt embeddings [1, L, D] are known; the VAE's encoder runs
    for it, and the modulation of every sigma is computed."""
    model = checkpoint.model
    sizes, scheduler, rotary = model.areas, model.scheduler, model.rotary
    encoded: list[Values] = [encoder_feed(prepare(s.image, sizes).vae) for s in samples]
    run(GRAPHS["vae_encoder"](checkpoint.model, "float32"), readers, encoded, progress)
    latents = [values["latents"] for values in encoded]
    grids = [(found.shape[1], found.shape[2]) for found in latents]
    strengths = [
        float(sigmas(scheduler, steps=STEPS, noise_tokens=h * w)[int(s.share * STEPS)])
        for s, (h, w) in zip(samples, grids, strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix="qie-") as folder:
        record = write_modulation(model.transformer, readers, Path(folder), tables="float32")
        tables = compute_tables(
            Path(folder),
            record,
            np.array([*strengths, 0], np.float32),
            progress=lambda done, total: progress("modulation", done, total),
        )
    blocks, out = np.split(tables, [tables.shape[1] - 2 * record.width], axis=1)
    values: list[Values] = []
    for number, (sample, found, grid, strength) in enumerate(zip(samples, latents, grids, strengths, strict=True)):
        x = found.reshape(1, grid[0] * grid[1], -1)
        noise = standard_normal(x.shape, seed=sample.seed, dtype="float32")
        values.append(
            transformer_feed(
                latents_BNC=(np.float32(1 - strength) * x + np.float32(strength) * noise).astype(np.float32),
                reference_BRC=x,
                prompt_BLD=prompts[number],
                rotary=rotary,
                grids=[grid, grid],
                modulation_YM=blocks[number].reshape(record.layers, -1),
                modulation_out_O=out[number],
                dsigma=-1 / STEPS,
            )
        )
    return values


def values_of(
    component: Component, checkpoint: Checkpoint, readers: Readers, samples: Sequence[Sample], progress: Progress
) -> list[Values]:
    """What the language model or the transformer reads of each sample."""
    words = language_values(checkpoint, readers, samples, progress)
    if component == "language":
        return words
    run(GRAPHS["language"](checkpoint.model, "float32"), readers, words, progress)
    return transformer_values(checkpoint, readers, samples, [v["prompt_embeds"] for v in words], progress)


def run(
    graph: Graph,
    readers: Readers,
    values: Sequence[Values],
    progress: Progress,
    *,
    watch: Mapping[str, Sequence[str]] | None = None,
    observer: Observer = lambda segment, sample, values: None,
    after: Callable[[Segment], None] = lambda segment: None,
    pieces: int | None = None,
) -> None:
    """Run ``values``, in place, through ``graph``, or through its first ``pieces``; ``after`` is called when a piece is
    done with all of them."""
    cut = segments(graph)
    for number, piece in enumerate(run_segments(cut, readers, values, watch=watch, observer=observer), start=1):
        after(piece)
        progress(graph.component, number, len(cut))
        if number == pieces:
            break


def _cropped(image: Image.Image, aspect: float | None) -> Image.Image:
    """The middle of ``image`` at that width by height."""
    if aspect is None:
        return image
    width, height = image.size
    new = (min(width, round(height * aspect)), min(height, round(width / aspect)))
    left, top = (width - new[0]) // 2, (height - new[1]) // 2
    return image.crop((left, top, left + new[0], top + new[1]))
