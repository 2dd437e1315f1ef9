"""Train the pocket model's VAE: ``python -m pocket.training.vae FOLDER``.

The encoder and the decoder are trained together first, then the decoder alone, mostly on photos. The latents no longer
change in the second phase, so the transformer may be trained meanwhile.

The loss is the mean over images of log(mean squared error), so a decibel counts the same on every image.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from pocket.data.examples import draw_example, draw_source
from pocket.data.images import HELD_OUT, SIDE, TRAINED, center_crop, random_crop
from pocket.model.vae import build_vae, decode, encode, to_unit
from pocket.training.muon import Muon, split_parameters
from pocket.training.run import Run, learning_rate
from qie.compiler.metrics.error import psnr_db

__all__ = ["draw_pool"]

POOL, BATCH = 4096, 8
"""Images per pool, and images per step."""

ADAMW = ("encoder.conv_in", "decoder.conv_out")
"""Prefixes of matrices that AdamW updates: input and output layers."""

QUARTERED_SHARE = 2 / 3
"""Share of the first phase that trains on the quarters of half as many images: twice as fast, and sufficient for all
layers but attention."""

LATENT_NOISE = 0.1
"""Standard deviation of the noise that the first phase adds to latents: the encoder learns to spread the latents, and
the decoder to tolerate small errors."""

LATENT_WEIGHT = 3e-4
"""Weight of the mean square of the latents, which keeps them near unit scale against that noise."""

AFFINE_WEIGHT = 10.0
"""Weight of ``affine_error``. With a nearly affine encoder, edits that are linear in pixels (grayscale, rotation, blur)
are linear in latents too, which the transformer learns many times faster."""


def draw_pool(seed: int, *, photos: bool) -> np.ndarray:
    """Training images, uint8 [POOL, SIDE, SIDE, 3].

    Half of them are sources and half results; with ``photos`` two thirds are photos and a third results.
    """
    rng = np.random.default_rng(seed)

    def photo() -> np.ndarray:
        return random_crop(rng, str(rng.choice(TRAINED)), SIDE, SIDE)

    def source() -> np.ndarray:
        return draw_source(rng, SIDE, SIDE).image

    def result() -> np.ndarray:
        return draw_example(rng, SIDE, SIDE).target

    kinds = (photo, photo, result) if photos else (source, result)
    return np.stack([kinds[i % len(kinds)]() for i in range(POOL)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of this training")
    parser.add_argument("--steps", type=int, default=8000, help="steps of encoder and decoder, default: 8000")
    parser.add_argument("--decoder-steps", type=int, default=4000, help="then, steps of the decoder, default: 4000")
    parser.add_argument("--rate", type=float, default=0.003, help="peak learning rate of matrices, default: 0.003")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights; each step has its own seed, so a resumed run equals a whole one
    torch.set_num_threads(os.cpu_count() or 1)
    vae = build_vae()
    matrices, rest = split_parameters(vae, ADAMW)
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 2e-3}]
    run = Run(options.folder, vae, Muon(groups))
    held_out = to_unit(np.stack([center_crop(name) for name in HELD_OUT]))

    def forward(x: Tensor, share: Tensor, noise: Tensor, with_encoder: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The decoded images, the latents, and the affine error.

        The affine error is the mean square of how far the latents of a mixture of two images are from the mixture of
        their latents, as a share of the variance of the latents.
        """
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(with_encoder):
                mixture = share * x + (1 - share) * x.roll(1, 0)
                z, z_mixture = encode(vae, torch.cat([x, mixture])).float().chunk(2)
            affine_error = (z_mixture - share * z - (1 - share) * z.roll(1, 0)).square().mean() / z.var()
            return decode(vae, z + noise), z, affine_error

    compiled = torch.compile(forward, dynamic=False)
    images, pool, started = np.empty(0), -1, time.monotonic()
    while run.step < options.steps + options.decoder_steps:
        if run.step == options.steps:
            vae.load_state_dict(run.average.weights())
        with_encoder = run.step < options.steps
        number, start = divmod(run.step * BATCH, POOL)
        torch.manual_seed(run.step)
        if pool != number:
            images, pool = draw_pool(number, photos=not with_encoder), number
        x = to_unit(images[start : start + BATCH])[:, :, 0]
        if run.step < QUARTERED_SHARE * options.steps:
            x = torch.cat([part for half in x[: BATCH // 2].chunk(2, 2) for part in half.chunk(2, 3)])
        x = x.contiguous(memory_format=torch.channels_last).unsqueeze(2)
        strength = LATENT_NOISE if with_encoder else 0.0
        noise = strength * torch.randn(len(x), 16, 1, x.shape[3] // 8, x.shape[4] // 8)
        y, z, affine_error = compiled(x, torch.rand(len(x), 1, 1, 1, 1), noise, with_encoder)
        error = (y.float() - x).square().flatten(1).mean(1)
        loss = error.add(1e-5).log().mean() + LATENT_WEIGHT * z.square().mean() + AFFINE_WEIGHT * affine_error
        loss.backward()
        run.advance(learning_rate_of(run.step, options))
        if run.step % 200 == 0:
            run.log(
                {
                    "step": run.step,
                    "loss": round(loss.item(), 4),
                    "held_out_psnr_db": round(round_trip_psnr_db(vae, run.average.weights(), held_out), 3),
                    "latent_std": round(z.std().item(), 3),
                    "affine_error": round(affine_error.item(), 4),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
    run.save()


def learning_rate_of(step: int, options: argparse.Namespace) -> float:
    """Share of the peak learning rate: one schedule per phase, the decoder's with half the peak."""
    if step < options.steps:
        return learning_rate(step, options.steps)
    return 0.5 * learning_rate(step - options.steps, options.decoder_steps)


@torch.no_grad()
def round_trip_psnr_db(vae: AutoencoderKLQwenImage, weights: dict[str, Tensor], x: Tensor) -> float:
    """Mean PSNR in dB of images [B, 3, 1, H, W] in -1 .. 1 after encoding and decoding with ``weights``."""

    class RoundTrip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, x: Tensor) -> Tensor:
            return decode(self.vae, encode(self.vae, x)).clamp(-1, 1)

    prefixed = {f"vae.{name}": value for name, value in weights.items()}
    decoded = torch.func.functional_call(RoundTrip(), prefixed, (x,))
    return fmean(psnr_db(y.numpy(), image.numpy(), peak=2.0) for y, image in zip(decoded, x, strict=True))


if __name__ == "__main__":
    main()
