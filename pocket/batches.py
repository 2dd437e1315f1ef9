"""Batches of samples as the editor's training reads them, made once and kept on the disk in pools."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocket.edits import EDITS, Instruction, Picture
from pocket.prompts import Prompter
from pocket.reader import load as load_reader
from pocket.samples import Sample, sample
from pocket.train_vae import decode as vae_decode
from pocket.train_vae import encode as vae_encode
from pocket.train_vae import load as load_vae
from pocket.train_vae import to_unit
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = ["BATCH", "POOL_BATCHES", "Batch", "Encoder", "draw", "importance", "pack", "pool", "unpack"]

BATCH, POOL_BATCHES = 32, 128

BLANK = 0.04
"""Share of samples with no instruction, whose result is the picture itself."""

FORMS = {(128, 128, 1): 0.76, (128, 128, 2): 0.08, (96, 160, 1): 0.08, (160, 96, 1): 0.08}
"""(height, width, pictures) -> share of the batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """BATCH samples of one form.

    target [B, N, 64] and references [B, R, 64] are normalized packed latents, prompt [B, S, D] prompt embeddings of
    which those count where words, bool [B, S], is true; all three are bfloat16. source [B, N] is the token of the first
    reference that each token of the target shows: itself, if nothing is moved.
    """

    form: tuple[int, int, int]
    prompt: Tensor
    words: Tensor
    target: Tensor
    references: Tensor
    source: Tensor


class Encoder:
    """Makes batches of samples, with the VAE and the text encoder that were trained in ``folder``."""

    def __init__(self, folder: Path, *, compile_: bool = True) -> None:
        self.vae = load_vae(folder / "vae")
        self.reader = load_reader(folder / "reader", folder / "configs")
        self.prompter = Prompter(folder / "configs")
        self.run = partial(vae_encode, self.vae)
        if compile_:
            self.run = torch.compile(self.run, dynamic=False)
        self.mean, self.std = statistics(folder, self.vae)

    def batch(self, samples: list[Sample], form: tuple[int, int, int]) -> Batch:
        prompts = self.prompter.prompts(samples)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prompt = self.reader.prompt(prompts)
        references = self.latents(np.stack([image for s in samples for image in s.images]))
        return Batch(
            form=form,
            prompt=prompt.bfloat16(),
            words=prompts.mask[:, PREFIX_TOKENS:].bool(),
            target=self.latents(np.stack([s.target for s in samples])).bfloat16(),
            references=references.reshape(len(samples), -1, 64).bfloat16(),
            source=torch.from_numpy(np.stack([source(s.asked, form[0] // 16, form[1] // 16) for s in samples])),
        )

    @torch.no_grad()
    def latents(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalized and packed, [B, N, 64]."""
        x = to_unit(images)
        x = x.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([self.run(part) for part in x.split(BATCH)])
        return pack((z[:, :, 0].float() - self.mean[:, None, None]) / self.std[:, None, None])


def source(asked: Sequence[Instruction], height: int, width: int) -> NDArray[np.int64]:
    """[N], where each token's content comes from: the edits that move things, done to a picture of token numbers."""
    numbers = np.arange(height * width).reshape(height, width, 1)
    for step in asked:
        if EDITS[step.name].kind == "geometry":
            numbers = EDITS[step.name].apply(Picture(image=numbers), {}, None)
    return numbers.reshape(-1)


def pack(z: Tensor) -> Tensor:
    """[B, 16, 2h, 2w] to [B, h * w, 64], channel first within a token."""
    batch, channels, height, width = z.shape
    z = z.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(batch, -1, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse; ``height`` and ``width`` are in tokens."""
    z = tokens.reshape(len(tokens), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(len(tokens), -1, height * 2, width * 2)


def statistics(folder: Path, vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents by channel, [16] each, over results of edits; computed once."""
    file = folder / "latents.pt"
    if not file.is_file():
        rng = np.random.default_rng(1)
        images = np.stack([sample(rng, 128, 128).target for _ in range(512)])
        with torch.no_grad():
            z = torch.cat([vae_encode(vae, part) for part in to_unit(images).split(16)])
        torch.save((z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))), file)
    mean, std = torch.load(file, weights_only=True)
    return mean, std


@torch.no_grad()
def importance(encoder: Encoder, images: int = 32, small: float = 0.1) -> Tensor:
    """[16, 16], symmetric with a mean diagonal of 1: what a small error of the latents costs in the picture.

    It is the mean over pictures of J' J, J being the derivative of the decoder with respect to one latent, from finite
    differences with random signs at all places at once (Hutchinson's estimate).
    """
    rng = np.random.default_rng(2)
    torch.manual_seed(2)
    x = to_unit(np.stack([sample(rng, 128, 128).target for _ in range(images)]))
    total = torch.zeros(len(encoder.std), len(encoder.std))
    for part in x.split(8):
        z = vae_encode(encoder.vae, part)
        still = vae_decode(encoder.vae, z)
        signs = torch.randint(0, 2, z[:, 0].shape) * 2.0 - 1
        moved = []
        for channel, std in enumerate(encoder.std):
            other = z.clone()
            other[:, channel] += small * std * signs
            moved.append((vae_decode(encoder.vae, other) - still).flatten())
        changes = torch.stack(moved)
        total += changes @ changes.T
    return total / total.diagonal().mean()


def pool(encoder: Encoder, folder: Path, number: int) -> list[Batch]:
    """The pool of that number: from the disk, or made."""
    file = folder / "pools" / f"{number}.pt"
    if file.is_file():
        return [Batch(**batch) for batch in torch.load(file, weights_only=True)]
    rng = np.random.default_rng(1000 + number)
    forms = list(FORMS)
    batches = []
    for _ in range(POOL_BATCHES):
        form = forms[rng.choice(len(forms), p=list(FORMS.values()))]
        batches.append(encoder.batch([draw(rng, form) for _ in range(BATCH)], form))
    file.parent.mkdir(exist_ok=True)
    fields = Batch.__dataclass_fields__
    torch.save([{name: getattr(batch, name) for name in fields} for batch in batches], file)
    return batches


def draw(rng: np.random.Generator, form: tuple[int, int, int]) -> Sample:
    """A sample of that form; now and then one with nothing asked."""
    height, width, pictures = form
    found = sample(rng, height, width, pictures=pictures)
    if rng.random() < BLANK:
        found = Sample(images=found.images, text=" ", marks=(), asked=(), target=found.images[0])
    return found
