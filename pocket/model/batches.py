"""Batches of encoded examples for the training of the transformer, stored on disk in pools."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from numpy.typing import NDArray
from torch import Tensor

from pocket.data.edits import EDITS, Instruction
from pocket.data.examples import Example, draw_example
from pocket.data.operations import Source
from pocket.model.prompts import PromptTokenizer
from pocket.model.text_encoder import load_text_encoder
from pocket.model.vae import decode, encode, load_vae, to_unit
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = [
    "BATCH",
    "POOL_BATCHES",
    "SHAPES",
    "Batch",
    "BatchEncoder",
    "Shape",
    "draw_training_example",
    "latent_metric",
    "load_pool",
    "pack",
    "source_index",
    "unpack",
]

BATCH = 32
"""Examples per batch."""

POOL_BATCHES = 128
"""Batches per pool."""

EMPTY_SHARE = 0.04
"""Share of examples with an empty instruction, whose target is the input."""

Shape = tuple[int, int, int]
"""(height, width, number of images) of an example, in pixels."""

SHAPES: dict[Shape, float] = {(128, 128, 1): 0.76, (128, 128, 2): 0.08, (96, 160, 1): 0.08, (160, 96, 1): 0.08}
"""Shape -> share of batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """BATCH encoded examples of one shape, in bfloat16.

    Attributes:
        shape: the shape of the examples.
        prompt: [B, L, D], prompt embeddings, padded on the right.
        prompt_mask: bool [B, L], true for real tokens.
        target: [B, N, 64], normalized packed latents of the result.
        references: [B, R, 64], normalized packed latents of the images.
        source_index: int64 [B, N], the token of the first image that each token of the target shows.
    """

    shape: Shape
    prompt: Tensor
    prompt_mask: Tensor
    target: Tensor
    references: Tensor
    source_index: Tensor


class BatchEncoder:
    """Encodes examples with the VAE and the text encoder of the training in ``folder``."""

    def __init__(self, folder: Path, *, compiled: bool = True) -> None:
        self.vae = load_vae(folder / "vae")
        self.text_encoder = load_text_encoder(folder / "text_encoder", folder / "configs")
        self.tokenizer = PromptTokenizer(folder / "configs")
        self.run = partial(encode, self.vae)
        if compiled:
            self.run = torch.compile(self.run, dynamic=False)
        self.mean, self.std = latent_statistics(folder, self.vae)

    def batch(self, examples: list[Example], shape: Shape) -> Batch:
        prompts = self.tokenizer.batch(examples)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prompt = self.text_encoder.prompt_embeds(prompts)
        references = self.latents(np.stack([image for e in examples for image in e.images]))
        rows, columns = shape[0] // 16, shape[1] // 16
        return Batch(
            shape=shape,
            prompt=prompt.bfloat16(),
            prompt_mask=prompts.mask[:, PREFIX_TOKENS:].bool(),
            target=self.latents(np.stack([e.target for e in examples])).bfloat16(),
            references=references.reshape(len(examples), -1, 64).bfloat16(),
            source_index=torch.from_numpy(np.stack([source_index(e.instructions, rows, columns) for e in examples])),
        )

    @torch.no_grad()
    def latents(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalized packed latents, [B, N, 64]."""
        x = to_unit(images)
        x = x.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([self.run(part) for part in x.split(BATCH)])
        return pack((z[:, :, 0].float() - self.mean[:, None, None]) / self.std[:, None, None])


def source_index(instructions: Sequence[Instruction], rows: int, columns: int) -> NDArray[np.int64]:
    """Where each token's content comes from, int64 [N]: the geometric edits, applied to an image of token indices."""
    index = np.arange(rows * columns).reshape(rows, columns, 1)
    for instruction in instructions:
        if EDITS[instruction.name].kind == "geometry":
            index = EDITS[instruction.name].apply(Source(image=index), {}, None)
    return index.reshape(-1)


def pack(z: Tensor) -> Tensor:
    """[B, 16, 2h, 2w] to [B, h * w, 64], channels major within a token."""
    batch, channels, height, width = z.shape
    z = z.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(batch, -1, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``; ``height`` and ``width`` are in tokens."""
    z = tokens.reshape(len(tokens), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(len(tokens), -1, height * 2, width * 2)


def latent_statistics(folder: Path, vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over targets, [16] each; stored in ``folder``."""
    file = folder / "latents.pt"
    if not file.is_file():
        rng = np.random.default_rng(1)
        images = np.stack([draw_example(rng, 128, 128).target for _ in range(512)])
        with torch.no_grad():
            z = torch.cat([encode(vae, part) for part in to_unit(images).split(16)])
        torch.save((z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))), file)
    mean, std = torch.load(file, weights_only=True)
    return mean, std


@torch.no_grad()
def latent_metric(encoder: BatchEncoder, images: int = 32, epsilon: float = 0.1) -> Tensor:
    """How much errors of the latents change the image: symmetric [16, 16] with a mean diagonal of 1.

    It is the mean over images of J' J, where J is the derivative of the decoder with respect to one latent, estimated
    by finite differences with random signs at all positions at once (Hutchinson's estimator).
    """
    rng = np.random.default_rng(2)
    torch.manual_seed(2)
    x = to_unit(np.stack([draw_example(rng, 128, 128).target for _ in range(images)]))
    metric = torch.zeros(len(encoder.std), len(encoder.std))
    for part in x.split(8):
        z = encode(encoder.vae, part)
        decoded = decode(encoder.vae, z)
        signs = torch.randint(0, 2, z[:, 0].shape) * 2.0 - 1
        changes = []
        for channel, std in enumerate(encoder.std):
            perturbed = z.clone()
            perturbed[:, channel] += epsilon * std * signs
            changes.append((decode(encoder.vae, perturbed) - decoded).flatten())
        jacobian = torch.stack(changes)
        metric += jacobian @ jacobian.T
    return metric / metric.diagonal().mean()


def load_pool(encoder: BatchEncoder, folder: Path, number: int) -> list[Batch]:
    """Pool ``number``, read from disk, or encoded and written there."""
    file = folder / "pools" / f"{number}.pt"
    if file.is_file():
        return [Batch(**batch) for batch in torch.load(file, weights_only=True)]
    rng = np.random.default_rng(1000 + number)
    shapes = list(SHAPES)
    batches = []
    for _ in range(POOL_BATCHES):
        shape = shapes[rng.choice(len(shapes), p=list(SHAPES.values()))]
        batches.append(encoder.batch([draw_training_example(rng, shape) for _ in range(BATCH)], shape))
    file.parent.mkdir(exist_ok=True)
    torch.save([{field.name: getattr(batch, field.name) for field in fields(batch)} for batch in batches], file)
    return batches


def draw_training_example(rng: np.random.Generator, shape: Shape) -> Example:
    """A random example of ``shape``; EMPTY_SHARE of them with an empty instruction."""
    height, width, images = shape
    example = draw_example(rng, height, width, images=images)
    if rng.random() < EMPTY_SHARE:
        return Example(images=example.images, text=" ", mentions=(), instructions=(), target=example.images[0])
    return example
