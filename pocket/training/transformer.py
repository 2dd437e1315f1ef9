"""Train the pocket model's transformer: ``python -m pocket.training.transformer FOLDER``.

The transformer is that of diffusers, and so is the objective: a rectified flow from noise to the latents of the result,
z = (1 - sigma) * x + sigma * noise, with the velocity noise - x. The result is a function of images and instruction, so
the best velocity is determined at every sigma, and few steps reach what many steps reach.

FOLDER/vae and FOLDER/text_encoder hold the trainings that come before this one (``pocket.training.vae``,
``pocket.training.text_encoder``), FOLDER/pools the encoded examples, FOLDER/transformer this training.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocket.model.batches import POOL_BATCHES, Batch, BatchEncoder, latent_metric, load_pool
from pocket.model.transformer import Transformer
from pocket.training.muon import Muon, split_parameters
from pocket.training.run import Run, learning_rate

__all__ = ["ADAMW", "train_step"]

ADAMW = (
    "auxiliary",
    *(f"transformer.{name}" for name in ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed")),
)
"""Prefixes of matrices that AdamW updates: input and output layers."""

POOLS, POOL_STEPS = 3, 512
"""Number of pools to draw batches from, and steps after which a new pool replaces the oldest."""

SHIFT = 6.0
"""Shift of the uniformly drawn sigmas, as of inference schedules: high noise levels decide most of the result."""

AUXILIARY_WEIGHT = 0.1
"""Weight of the auxiliary loss at the peak learning rate; it decays with the learning rate."""

UNIFORM_SHARE = 0.25
"""Share of the loss that weights all latent channels alike; the rest weights errors by their effect on the image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the training")
    parser.add_argument("--steps", type=int, default=4200, help="default: 4200")
    parser.add_argument("--rate", type=float, default=0.03, help="peak learning rate of matrices, default: 0.03")
    options = parser.parse_args()
    folder = options.folder
    torch.manual_seed(0)  # for the initial weights; each step has its own seed, so a resumed run equals a whole one
    torch.set_num_threads(os.cpu_count() or 1)
    model, encoder = Transformer(folder / "configs"), BatchEncoder(folder)
    metric = UNIFORM_SHARE * torch.eye(16) + (1 - UNIFORM_SHARE) * latent_metric(encoder)
    matrices, rest = split_parameters(model, ADAMW)
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 1e-3}]
    run = Run(folder / "transformer", model, Muon(groups))
    pools: list[list[Batch]] = []
    newest, started, losses = -1, time.monotonic(), []
    while run.step < options.steps:
        current = run.step // POOL_STEPS
        while newest < current:
            newest = max(newest + 1, current - POOLS + 1)
            pools = [*pools, load_pool(encoder, folder, newest)][-POOLS:]
        rng = np.random.default_rng(run.step)
        torch.manual_seed(run.step)
        batch = pools[rng.integers(len(pools))][rng.integers(POOL_BATCHES)]
        share = learning_rate(run.step, options.steps)
        losses.append(train_step(model, batch, metric, share))
        run.advance(share)
        if run.step % 50 == 0:
            seconds = round(time.monotonic() - started, 1)
            loss, weighted, auxiliary = np.mean(losses, axis=0).round(4)
            row = {"step": run.step, "loss": loss, "weighted": weighted, "auxiliary": auxiliary, "seconds": seconds}
            run.log(row)
            losses.clear()
    run.save()


def train_step(model: Transformer, batch: Batch, metric: Tensor, share: float = 1.0) -> tuple[float, float, float]:
    """Accumulate the gradients of one batch.

    Args:
        model: the transformer.
        batch: the examples.
        metric: [16, 16], weights of the products of errors of two latent channels.
        share: share of AUXILIARY_WEIGHT that applies.

    Returns:
        The mean squared error of the velocity, the same weighted by ``metric``, and the auxiliary loss.
    """
    target = batch.target.float()
    uniform = torch.rand(len(target))
    sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).clamp(0.02, 1)
    noise = torch.randn_like(target)
    sigma_B11 = sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity, auxiliary = model(batch, (1 - sigma_B11) * target + sigma_B11 * noise, sigma)
    error = (velocity.float() - (noise - target)).unflatten(-1, (16, 4))
    weighted = torch.einsum("bncp,cd,bndp->", error, metric, error) / error.numel()
    (weighted + AUXILIARY_WEIGHT * share * auxiliary).backward()
    return error.square().mean().item(), weighted.item(), auxiliary.item()


if __name__ == "__main__":
    main()
