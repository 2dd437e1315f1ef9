"""Train the pocket model's transformer: ``python -m pocket.train_editor FOLDER``.

The model is diffusers' one, and so is what it is taught: a rectified flow from noise to the latents of the result,
z = (1 - sigma) * x + sigma * noise, whose velocity is noise - x. The result is a function of pictures and instruction,
so the best velocity is known at every sigma, and few steps reach what many do.

FOLDER/vae and FOLDER/reader hold the trainings that come before (``pocket.train_vae``, ``pocket.train_reader``),
FOLDER/pools what was encoded once, FOLDER/editor this one.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocket.batches import POOL_BATCHES, Batch, Encoder, importance, pool
from pocket.editor import Editor
from pocket.muon import Muon, split
from pocket.run import Run, learning_rate

__all__ = ["ENDS", "train_step"]

ENDS = ("seer", *(f"transformer.{name}" for name in ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed")))
"""Where values come in and go out: no matrices for Muon."""

POOLS, STEPS_A_POOL = 3, 512
"""A new pool of samples comes after this many steps, and the oldest goes when there are so many."""

SHIFT = 6.0
"""Sigmas are drawn uniformly and shifted by this, as schedules are: most is decided while the noise is strong."""

SEER = 0.1
"""Weight of the seer's questions at the peak of the learning rate, with which it falls."""

EVEN = 0.25
"""Share of the loss in which all latents count alike; in the rest they count as much as they change the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--rate", type=float, default=0.03)
    options = parser.parse_args()
    folder = options.folder
    torch.manual_seed(0)  # of the first weights; every step has a seed of its own, so that a resumed run is the same
    torch.set_num_threads(os.cpu_count() or 1)
    model, encoder = Editor(folder / "configs"), Encoder(folder)
    metric = EVEN * torch.eye(16) + (1 - EVEN) * importance(encoder)
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
        share = learning_rate(run.step, options.steps)
        losses.append(train_step(model, batch, metric, share))
        run.advance(share)
        if run.step % 50 == 0:
            seconds = round(time.monotonic() - started, 1)
            loss, weighed, seen = np.mean(losses, axis=0).round(4)
            run.log({"step": run.step, "loss": loss, "weighed": weighed, "seer": seen, "seconds": seconds})
            losses.clear()
    run.save()


def train_step(model: Editor, batch: Batch, metric: Tensor, share: float = 1.0) -> tuple[float, float, float]:
    """Leaves the gradients of one batch; returns the mean square error of the velocity, plain and weighed, and the
    seer's loss.

    ``metric`` [16, 16] is what errors of a latent's channels count; ``share`` is how much the seer does, of SEER.
    """
    target = batch.target.float()
    uniform = torch.rand(len(target))
    sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).clamp(0.02, 1)
    noise = torch.randn_like(target)
    strength = sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity, seen = model(batch, (1 - strength) * target + strength * noise, sigma)
    error = (velocity.float() - (noise - target)).unflatten(-1, (16, 4))
    weighed = torch.einsum("bncp,cd,bndp->", error, metric, error) / error.numel()
    (weighed + SEER * share * seen).backward()
    return error.square().mean().item(), weighed.item(), seen.item()


if __name__ == "__main__":
    main()
