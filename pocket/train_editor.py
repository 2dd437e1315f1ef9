"""Train the pocket model's editor, both networks together: ``python -m pocket.train_editor FOLDER``.

The model is the one of diffusers and transformers, and so is what it is taught: a rectified flow from noise to the
latents of the result, z = (1 - sigma) * x + sigma * noise, whose velocity is noise - x. The result is a function of
pictures and instruction, so the best velocity is known at every sigma, and few steps reach what many do.

FOLDER/vae holds the VAE's training (``pocket.train_vae``), FOLDER/pools what was encoded once, FOLDER/editor this one.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from pocket.batches import BATCH, POOL_BATCHES, Batch, Encoder, draw, pool
from pocket.checkpoint import write_configs
from pocket.muon import Muon, split
from pocket.network import Editor
from pocket.run import Run, learning_rate

__all__ = ["ENDS", "train_step", "word_step"]

ENDS = (
    "reader",
    "seer",
    *(f"transformer.{name}" for name in ("img_in", "txt_in", "proj_out", "norm_out", "time_text_embed")),
    "text_encoder.model.visual.patch_embed",
    "text_encoder.model.language_model.embed_tokens",
)
"""Where values come in and go out: no matrices for Muon."""

POOLS, STEPS_A_POOL = 6, 512
"""A new pool of samples comes after this many steps, and the oldest goes when there are so many."""

WORD_STEPS = 300
"""Steps of the vision-language model alone, before the transformer: see ``Reader``."""

SHIFT = 6.0
"""Sigmas are drawn uniformly and shifted by this, as schedules are: most is decided while the noise is strong."""

SEER = 0.1
"""Weight of the seer's questions at the peak of the learning rate, with which it falls."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4200)
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
        if run.step < WORD_STEPS:
            losses.append((word_step(model, encoder, run.step), 0.0))
            share = learning_rate(run.step, WORD_STEPS)
            finish_step(run, share, losses, started)
            continue
        wanted = (run.step - WORD_STEPS) // STEPS_A_POOL
        while newest < wanted:
            newest = max(newest + 1, wanted - POOLS + 1)
            pools = [*pools, pool(encoder, folder, newest)][-POOLS:]
        rng = np.random.default_rng(run.step)
        torch.manual_seed(run.step)
        batch = pools[rng.integers(len(pools))][rng.integers(POOL_BATCHES)]
        share = learning_rate(run.step - WORD_STEPS, options.steps - WORD_STEPS)
        losses.append(train_step(model, batch, share))
        finish_step(run, share, losses, started)
    run.save()


def finish_step(run: Run, share: float, losses: list[tuple[float, float]], started: float) -> None:
    """Apply the gradients at ``share`` of the peak rates, and log now and then."""
    run.advance(share)
    if run.step % 50 == 0:
        seconds = round(time.monotonic() - started, 1)
        loss, seen = np.mean(losses, axis=0)
        run.log({"step": run.step, "loss": round(loss, 4), "seer": round(seen, 4), "seconds": seconds})
        losses.clear()


def word_step(model: Editor, encoder: Encoder, step: int) -> float:
    """Leaves the gradients of one batch of ``Reader``'s questions; returns its loss."""
    rng = np.random.default_rng([1, step])
    torch.manual_seed(step)
    samples = [draw(rng, (128, 128, 1)) for _ in range(BATCH)]
    prompts = encoder.prompts(samples, 1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.prompt(prompts)
    loss = model.reader(hidden, prompts, samples, model.text_encoder.config.image_token_id)
    loss.backward()
    return loss.item()


def train_step(model: Editor, batch: Batch, share: float = 1.0) -> tuple[float, float]:
    """Leaves the gradients of one batch; returns the mean square error of the velocity, and the seer's loss.

    ``share`` is how much the seer's counts, of SEER.
    """
    target = batch.target.float()
    uniform = torch.rand(len(target))
    sigma = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).clamp(0.02, 1)
    noise = torch.randn_like(target)
    strength = sigma[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        velocity, seen = model(batch, (1 - strength) * target + strength * noise, sigma)
    loss = functional.mse_loss(velocity.float(), noise - target)
    (loss + SEER * share * seen).backward()
    return loss.item(), seen.item()


if __name__ == "__main__":
    main()
