"""Train the pocket model's text encoder: ``python -m pocket.train_reader FOLDER``.

It learns to say what instructions were (``pocket.reader.Reader``) and changes no more after that, as the published
model's, which a transformer is trained on. FOLDER/reader holds this training.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from pocket.batches import BATCH, FORMS, draw
from pocket.checkpoint import write_configs
from pocket.muon import Muon, split
from pocket.prompts import Prompter
from pocket.reader import Reader
from pocket.run import Run, learning_rate

__all__ = ["ENDS", "train_step"]

ENDS = (
    "heads",
    "colours",
    "text_encoder.model.visual.patch_embed",
    "text_encoder.model.language_model.embed_tokens",
)
"""Where values come in and go out: no matrices for Muon."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rate", type=float, default=0.03)
    options = parser.parse_args()
    torch.manual_seed(0)  # of the first weights; every step has a seed of its own, so that a resumed run is the same
    torch.set_num_threads(os.cpu_count() or 1)
    write_configs(options.folder / "configs")
    reader, prompter = Reader(options.folder / "configs"), Prompter(options.folder / "configs")
    matrices, rest = split(reader, ENDS)
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 3e-3}]
    run = Run(options.folder / "reader", reader, Muon(groups))
    started, losses = time.monotonic(), []
    while run.step < options.steps:
        losses.append(train_step(reader, prompter, run.step))
        run.advance(learning_rate(run.step, options.steps))
        if run.step % 50 == 0:
            seconds = round(time.monotonic() - started, 1)
            run.log({"step": run.step, "loss": round(float(np.mean(losses)), 4), "seconds": seconds})
            losses.clear()
    run.save()


def train_step(reader: Reader, prompter: Prompter, step: int) -> float:
    """Leaves the gradients of one batch of questions; returns the loss."""
    rng = np.random.default_rng([1, step])
    torch.manual_seed(step)
    forms = list(FORMS)
    form = forms[rng.choice(len(forms), p=list(FORMS.values()))]
    samples = [draw(rng, form) for _ in range(BATCH)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = reader(prompter.prompts(samples))
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
