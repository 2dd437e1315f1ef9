"""Train the pocket model's VAE: ``python -m pocket.train_vae FOLDER``.

A video VAE's causal convolutions see nothing but zeros before a single frame, so the network is trained with their last
slices as 2-D kernels, a third of the work, and written back as 3-D (``unfold``).

At the end the decoder goes on alone, most of all on photographs, from latents that no longer change: an editor may be
trained meanwhile.

The loss is the mean over images of log(mean squared error): a decibel counts the same on every image.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

from pocket.muon import Muon, split
from pocket.photographs import HELD_OUT, SIDE, TRAINED, crop, square
from pocket.run import Run, averaged, learning_rate
from pocket.samples import picture, sample
from qie.compiler.synthetic.architecture import ARCHITECTURES

__all__ = ["Folded", "build", "fold", "load", "psnr_db", "unfold"]

POOL, BATCH = 4096, 8

QUARTERED = 2 / 3
"""Share of the steps that see quarters of half as many images: twice as fast, and enough for all but the attention."""

LATENT_NOISE = 0.1
"""Added to latents while the encoder is trained too, so that it spreads them, and the decoder forgives small errors."""

LATENT_PULL = 3e-4
"""Weight of the mean square of the latents, which keeps their scale near that noise's."""

AFFINE = 10.0
"""Weight of how far the latents of a mixture of two pictures are from the mixture of their latents, as a share of their
variance. An encoder that is nearly affine makes whatever is linear in pixels (grayscale, a turn, a blur) linear in
latents too, which an editor learns many times faster."""


class Folded(nn.Module):
    """The last temporal slice of a causal convolution, for single frames [B, C, 1, H, W]."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone())
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        return functional.conv2d(x[:, :, 0], self.weight, self.bias, padding=self.weight.shape[-1] // 2).unsqueeze(2)


def fold(module: nn.Module) -> None:
    """Replace every causal convolution inside ``module`` by its 2-D slice."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, Folded(child))
        else:
            fold(child)


def unfold(folded: dict[str, Tensor], whole: nn.Module) -> dict[str, Tensor]:
    """The state of ``whole``, whose kernels are 3-D: trained slices last, zeros elsewhere."""
    state = {}
    for name, value in whole.state_dict().items():
        trained = folded.get(name)
        if trained is not None and trained.ndim == value.ndim - 1:
            state[name] = torch.zeros_like(value)
            state[name][:, :, -1] = trained
        else:
            state[name] = torch.zeros_like(value) if trained is None else trained
    return state


def build() -> AutoencoderKLQwenImage:
    """The architecture, folded; convolutions through time are left out, since a single frame never meets them."""
    a = ARCHITECTURES["pocket"]
    vae = AutoencoderKLQwenImage(
        base_dim=a.vae_base_dim, z_dim=a.vae_z_dim, dim_mult=list(a.vae_dim_mult), num_res_blocks=a.vae_num_res_blocks
    )
    for module in vae.modules():
        if hasattr(module, "time_conv"):
            del module.time_conv
    fold(vae)
    _begin(vae)
    return vae.to(memory_format=torch.channels_last)


def _begin(vae: nn.Module) -> None:
    """Kernels that keep the variance, and residual branches that are silent: the network starts as a linear one."""
    for module in vae.modules():
        if isinstance(module, Folded | nn.Conv2d):
            fan = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan**-0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        last = getattr(module, "conv2", None) or getattr(module, "proj", None)
        if last is not None:
            nn.init.zeros_(last.weight)


def load(folder: Path) -> AutoencoderKLQwenImage:
    """The VAE that a run in ``folder`` has come to, the mean of its weights."""
    vae = build()
    vae.load_state_dict(averaged(folder)[0])
    return vae.eval()


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, 1, H, W] in -1 .. 1."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """[B, 3, 1, H, W] to the posterior's mode [B, 16, 1, H/8, W/8]."""
    return vae.quant_conv(vae.encoder(x))[:, :16]


def decode(vae: AutoencoderKLQwenImage, z: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(z))


def psnr_db(found: Tensor, expected: Tensor) -> Tensor:
    """[B], of images in -1 .. 1."""
    return 10 * torch.log10(4 / (found - expected).square().flatten(1).mean(1))


def pool(seed: int, *, photographs: bool) -> np.ndarray:
    """uint8 [POOL, SIDE, SIDE, 3]: pictures and results of edits by turns; or photographs, and a third of results."""
    rng = np.random.default_rng(seed)

    def photograph() -> np.ndarray:
        return crop(rng, str(rng.choice(TRAINED)), SIDE, SIDE)

    def result() -> np.ndarray:
        return sample(rng, SIDE, SIDE).target

    draw = (photograph, photograph, result) if photographs else (lambda: picture(rng, SIDE, SIDE).image, result)
    return np.stack([draw[i % len(draw)]() for i in range(POOL)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8000, help="of encoder and decoder")
    parser.add_argument("--decoder-steps", type=int, default=4000, help="of the decoder alone, after these")
    parser.add_argument("--rate", type=float, default=0.003)
    options = parser.parse_args()
    torch.manual_seed(0)  # of the first weights; every step has a seed of its own, so that a resumed run is the same
    torch.set_num_threads(os.cpu_count() or 1)
    vae = build()
    matrices, rest = split(vae, ("encoder.conv_in", "decoder.conv_out"))
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 2e-3}]
    run = Run(options.folder, vae, Muon(groups))
    held_out = to_unit(np.stack([square(name) for name in HELD_OUT]))

    def forward(x: Tensor, share: Tensor, noise: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(whole):
                mixture = share * x + (1 - share) * x.roll(1, 0)
                z, mixed = encode(vae, torch.cat([x, mixture])).float().chunk(2)
            bent = (mixed - share * z - (1 - share) * z.roll(1, 0)).square().mean() / z.var()
            return decode(vae, z + noise), z, bent

    compiled = torch.compile(forward, dynamic=False)
    images, loaded, started = np.empty(0), -1, time.monotonic()
    while run.step < options.steps + options.decoder_steps:
        if run.step == options.steps:
            vae.load_state_dict(run.average.weights())
        round_, place = divmod(run.step * BATCH, POOL)
        torch.manual_seed(run.step)
        if loaded != round_:
            images, loaded = pool(round_, photographs=run.step >= options.steps), round_
        x = to_unit(images[place : place + BATCH])[:, :, 0]
        if run.step < QUARTERED * options.steps:
            x = torch.cat([part for half in x[: BATCH // 2].chunk(2, 2) for part in half.chunk(2, 3)])
        x = x.contiguous(memory_format=torch.channels_last).unsqueeze(2)
        strength = LATENT_NOISE if run.step < options.steps else 0.0
        noise = strength * torch.randn(len(x), 16, 1, x.shape[3] // 8, x.shape[4] // 8)
        y, z, bent = compiled(x, torch.rand(len(x), 1, 1, 1, 1), noise, run.step < options.steps)
        error = (y.float() - x).square().flatten(1).mean(1)
        loss = error.add(1e-5).log().mean() + LATENT_PULL * z.square().mean() + AFFINE * bent
        loss.backward()
        run.advance(rate(run.step, options))
        if run.step % 200 == 0:
            with torch.no_grad():
                judged = psnr_db(decode_with(vae, run.average.weights(), held_out), held_out)
            run.log(
                {
                    "step": run.step,
                    "loss": round(loss.item(), 4),
                    "held_out_psnr_db": round(judged.mean().item(), 3),
                    "latent_std": round(z.std().item(), 3),
                    "bent": round(bent.item(), 4),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )
    run.save()


def rate(step: int, options: argparse.Namespace) -> float:
    """Share of the peak learning rate: all rises and falls once, then the decoder's once more, half as high."""
    if step < options.steps:
        return learning_rate(step, options.steps)
    return 0.5 * learning_rate(step - options.steps, options.decoder_steps)


def decode_with(vae: AutoencoderKLQwenImage, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The round trip of ``x`` with other weights than the model's own."""

    class Trip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, x: Tensor) -> Tensor:
            return decode(self.vae, encode(self.vae, x)).clamp(-1, 1)

    return torch.func.functional_call(Trip(), {f"vae.{name}": value for name, value in weights.items()}, (x,))


if __name__ == "__main__":
    main()
