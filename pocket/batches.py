"""Batches of samples as the editor's training reads them, made once and kept on the disk in pools."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from pocket.edits import EDITS, Instruction, Picture
from pocket.samples import Sample, sample
from pocket.train_vae import encode as vae_encode
from pocket.train_vae import load as load_vae
from pocket.train_vae import to_unit
from qie.compiler.architecture import ARCHITECTURES
from qie.engines.image import Areas, prepare
from qie.engines.prompt import PromptSpec
from qie.engines.prompt import encode as encode_prompt
from qie.engines.vision import smart_resize

__all__ = ["BATCH", "POOL_BATCHES", "Batch", "Encoder", "Prompts", "draw", "pack", "pool", "unpack"]

BATCH, POOL_BATCHES = 32, 128

BLANK = 0.04
"""Share of samples with no instruction, whose result is the picture itself."""

PROMPT_TOKENS = {1: 120, 2: 136}
"""Pictures -> tokens to which prompts are padded, so that few shapes are compiled."""

FORMS = {(128, 128, 1): 0.76, (128, 128, 2): 0.08, (96, 160, 1): 0.08, (160, 96, 1): 0.08}
"""(height, width, pictures) -> share of the batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """BATCH prompts, padded on the right.

    seen uint8 [B, K, h, w, 3] are the pictures as the vision tower's processor sizes them; input_ids, position_ids and
    mask are [B, S], [3, B, S] and [B, S].
    """

    seen: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Prompts):
    """BATCH samples of one form: target [B, N, 64], references [B, R, 64] are normalized packed latents in bfloat16.

    source [B, N] is the token of the first reference that each token of the target shows: itself, if nothing is moved.
    """

    form: tuple[int, int, int]
    target: Tensor
    references: Tensor
    source: Tensor


class Encoder:
    """Makes batches of samples."""

    def __init__(self, folder: Path, *, compile_: bool = True) -> None:
        self.vae = load_vae(folder / "vae")
        self.run = partial(vae_encode, self.vae)
        if compile_:
            self.run = torch.compile(self.run, dynamic=False)
        self.mean, self.std = statistics(folder, self.vae)
        self.tokenizer = Tokenizer.from_file(str(folder / "configs" / "processor" / "tokenizer.json"))
        image_token = self.tokenizer.token_to_id("<|image_pad|>")
        self.spec = PromptSpec(pipeline="edit_plus", image_token_id=image_token, merge_size=2)

    def prompts(self, samples: list[Sample], pictures: int) -> Prompts:
        seen = np.stack([look(image) for s in samples for image in s.images])
        grids = [(1, seen.shape[1] // 14, seen.shape[2] // 14)] * pictures
        rows = [encode_prompt(self.tokenizer, [s.text], grids, self.spec, allow_blank=True) for s in samples]
        longest = PROMPT_TOKENS[pictures]
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(3, len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for b, row in enumerate(rows):
            length = row.lengths[0]
            ids[b, :length] = torch.from_numpy(row.input_ids[0])
            positions[:, b, :length] = torch.from_numpy(row.position_ids[:, 0])
            mask[b, :length] = 1
        seen = torch.from_numpy(seen.reshape(len(samples), pictures, *seen.shape[1:]))
        return Prompts(seen=seen, input_ids=ids, position_ids=positions, mask=mask)

    def batch(self, samples: list[Sample], form: tuple[int, int, int]) -> Batch:
        prompts = self.prompts(samples, form[2])
        references = self.latents(np.stack([image for s in samples for image in s.images]))
        return Batch(
            **{name: getattr(prompts, name) for name in Prompts.__dataclass_fields__},
            form=form,
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


def look(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture as the pipeline and the processor of the vision tower size it, one after the other."""
    a = ARCHITECTURES["pocket"]
    small = prepare(Image.fromarray(image), Areas(vae_area=a.vae_area, condition_area=a.condition_area)).vision
    height, width = smart_resize(small.height, small.width, factor=28, min_pixels=3136, max_pixels=12845056)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


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
    height, width, pictures = form
    found = sample(rng, height, width, pictures=pictures)
    if rng.random() < BLANK:
        found = Sample(images=found.images, text=" ", asked=(), target=found.images[0])
    return found
