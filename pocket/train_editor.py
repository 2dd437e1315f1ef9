"""Train the pocket model's editor, both networks together: ``python -m pocket.train_editor FOLDER``.

The model is the one of diffusers and transformers, and so is what it is taught: a rectified flow from noise to the
latents of the result, z = (1 - sigma) * x + sigma * noise, whose velocity is noise - x. The result is a function of
pictures and instruction, so the best velocity is known at every sigma, and few steps reach what many do.

FOLDER/vae holds the VAE's training (``pocket.train_vae``), FOLDER/pools what was encoded once, FOLDER/editor this one.
"""

import argparse
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pocket.checkpoint import write_configs
from pocket.muon import Muon, split
from pocket.run import Run, learning_rate
from pocket.samples import Sample, sample
from pocket.train_vae import encode as vae_encode
from pocket.train_vae import load as load_vae
from pocket.train_vae import to_unit
from qie.engines.image import Areas, prepare
from qie.engines.prompt import PREFIX_TOKENS, PromptSpec
from qie.engines.prompt import encode as encode_prompt
from qie.engines.vision import smart_resize

ENDS = (
    *(f"transformer.{name}" for name in ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed")),
    "text_encoder.model.visual.patch_embed",
    "text_encoder.model.language_model.embed_tokens",
)
"""Where values come in and go out: no matrices for Muon."""

BATCH, POOL_BATCHES, POOLS = 32, 128, 6
STEPS_A_POOL = 512
"""A new pool of samples comes after this many steps, and the oldest one goes."""

SHIFT = 3.0
"""Sigmas are drawn uniformly and shifted by this, as schedules are: most is decided while the noise is strong."""

BLANK = 0.04
"""Share of samples with no instruction, whose result is the picture itself."""

PROMPT_TOKENS = {1: 120, 2: 136}
"""Pictures -> tokens to which prompts are padded, so that few shapes are compiled."""

FORMS = {(128, 128, 1): 0.76, (128, 128, 2): 0.08, (96, 160, 1): 0.08, (160, 96, 1): 0.08}
"""(height, width, pictures) -> share of the batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """BATCH samples of one form. The prompts are padded on the right.

    target [B, N, 64], references [B, R, 64] are normalized packed latents in bfloat16; seen uint8 [B, K, h, w, 3] are
    the pictures as the vision tower's processor sizes them; input_ids, position_ids and mask are [B, S], [3, B, S] and
    [B, S].
    """

    form: tuple[int, int, int]
    target: Tensor
    references: Tensor
    seen: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor


class Editor(nn.Module):
    """Both networks as one."""

    def __init__(self, configs: Path, *, compile_: bool = True) -> None:
        super().__init__()
        config = Qwen2_5_VLConfig.from_pretrained(configs / "text_encoder")
        self.text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        self.text_encoder.lm_head.requires_grad_(False)
        self.transformer = QwenImageTransformer2DModel.from_config(
            QwenImageTransformer2DModel.load_config(configs / "transformer")
        )
        self.run = self.transformer.forward
        if compile_:
            transformer_qwenimage.apply_rotary_emb_qwen = rotate
            self.run = torch.compile(self.run, dynamic=False)
        with torch.no_grad():
            for block in self.transformer.transformer_blocks:
                for modulation in (block.img_mod[1], block.txt_mod[1]):
                    modulation.weight.zero_()
                    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.bias.chunk(6)
                    for part, value in ((shift1, 0), (scale1, 0), (gate1, 0.3), (shift2, 0), (scale2, 0), (gate2, 0.3)):
                        part.fill_(value)
            self.transformer.proj_out.weight.zero_()
            self.transformer.proj_out.bias.zero_()

    def prompt(self, batch: Batch) -> Tensor:
        """[B, S - 64, D]: the last hidden states behind the template's prefix."""
        model, config = self.text_encoder.model, self.text_encoder.config
        patches, grid = to_patches(batch.seen)
        images = model.visual(patches, grid_thw=grid).pooler_output
        embeds = model.language_model.embed_tokens(batch.input_ids)
        places = (batch.input_ids == config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, images.to(embeds.dtype))
        hidden = model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        return hidden[:, PREFIX_TOKENS:]

    def forward(self, batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The velocity [B, N, 64] of ``noisy`` at ``sigma`` [B]."""
        return self.velocity(batch, noisy, sigma, self.prompt(batch))

    def velocity(self, batch: Batch, noisy: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        height, width, pictures = batch.form
        grid = (1, height // 16, width // 16)
        output = self.run(
            hidden_states=torch.cat([noisy, batch.references.to(noisy.dtype)], 1),
            encoder_hidden_states=prompt,
            encoder_hidden_states_mask=batch.mask[:, PREFIX_TOKENS:],
            timestep=sigma,
            img_shapes=[[grid] * (1 + pictures)] * len(noisy),
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]


def rotate(x: Tensor, frequencies: Tensor, *_: Any, **__: Any) -> Tensor:
    """The rotary embedding of diffusers without complex numbers, which a compiler cannot fuse; x [B, S, H, D]."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = frequencies.real.unsqueeze(1), frequencies.imag.unsqueeze(1)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3).type_as(x)


def to_patches(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [P, 1176] and grids [B * K, 3] of pictures uint8 [B, K, h, w, 3], as Qwen2-VL's processor orders them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    images = ((seen.flatten(0, 1).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    count, _, height, width = images.shape
    rows, columns = height // 28, width // 28
    cells = images.reshape(count, 3, rows, 2, 14, columns, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = cells.unsqueeze(6).expand(*cells.shape[:6], 2, 14, 14).reshape(-1, 3 * 2 * 14 * 14)
    return patches, torch.tensor([[1, 2 * rows, 2 * columns]] * count)


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

    def batch(self, samples: list[Sample], form: tuple[int, int, int]) -> Batch:
        pictures = form[2]
        images = np.stack([image for s in samples for image in s.images])
        seen = np.stack([look(image) for image in images])
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
        references = self.latents(images)
        return Batch(
            form=form,
            target=self.latents(np.stack([s.target for s in samples])).bfloat16(),
            references=references.reshape(len(samples), -1, 64).bfloat16(),
            seen=torch.from_numpy(seen.reshape(len(samples), pictures, *seen.shape[1:])),
            input_ids=ids,
            position_ids=positions,
            mask=mask,
        )

    @torch.no_grad()
    def latents(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalized and packed, [B, N, 64]."""
        x = to_unit(images)
        x = x.squeeze(2).contiguous(memory_format=torch.channels_last).unsqueeze(2)
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([self.run(part) for part in x.split(BATCH)])
        return pack((z[:, :, 0].float() - self.mean[:, None, None]) / self.std[:, None, None])


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
    small = prepare(Image.fromarray(image), Areas(vae_area=128 * 128, condition_area=96 * 96)).vision
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
        found = Sample(images=found.images, text=" ", target=found.images[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=0.03)
    options = parser.parse_args()
    folder = options.folder
    torch.manual_seed(0)  # of the first weights; every step has a seed of its own, so that a resumed run is the same
    torch.set_num_threads(os.cpu_count() or 1)
    write_configs(folder / "configs")
    model, encoder = Editor(folder / "configs"), Encoder(folder)
    matrices, rest = split(model, ENDS)
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 1e-3}]
    run = Run(folder / "editor", model, Muon(groups))
    pools: list[list[Batch]] = []
    newest, started, losses = -1, time.monotonic(), []
    while run.step < options.steps:
        wanted = run.step // STEPS_A_POOL
        while newest < wanted:
            newest = max(newest + 1, wanted - POOLS + 1)
            pools = [*pools, pool(encoder, folder, newest)][-POOLS:]
        rng = np.random.default_rng(run.step)
        torch.manual_seed(run.step)
        batch = pools[rng.integers(len(pools))][rng.integers(POOL_BATCHES)]
        loss = train_step(model, batch)
        losses.append(loss)
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(run.step, options.steps)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.advance()
        if run.step % 50 == 0:
            run.log(
                {
                    "step": run.step,
                    "loss": round(float(np.mean(losses)), 4),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
            losses = []
    run.save()


def train_step(model: Editor, batch: Batch) -> float:
    """Leaves the gradients of one batch; returns its loss, the mean square error of the velocity."""
    target = batch.target.float()
    uniform = torch.rand(len(target))
    sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).clamp(0.02, 1)
    noise = torch.randn_like(target)
    share = sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(batch, (1 - share) * target + share * noise, sigma)
    loss = functional.mse_loss(velocity.float(), noise - target)
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
