"""Train the pocket model's text encoder: ``python -m pocket.training.text_encoder FOLDER``.

It learns to classify instructions (``pocket.model.text_encoder``). The transformer is then trained on the frozen text
encoder, as the published one was. FOLDER/text_encoder holds this training.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from pocket.checkpoint import write_configs
from pocket.model.batches import BATCH, SHAPES, draw_training_example
from pocket.model.prompts import PromptTokenizer
from pocket.model.text_encoder import TextEncoder
from pocket.training.muon import Muon, split_parameters
from pocket.training.run import Run, learning_rate

__all__ = ["ADAMW", "train_step"]

ADAMW = (
    "heads",
    "color_head",
    "text_encoder.model.visual.patch_embed",
    "text_encoder.model.language_model.embed_tokens",
)
"""Prefixes of matrices that AdamW updates: input and output layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the training")
    parser.add_argument("--steps", type=int, default=3500, help="default: 3500")
    parser.add_argument("--rate", type=float, default=0.03, help="peak learning rate of matrices, default: 0.03")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights; each step has its own seed, so a resumed run equals a whole one
    torch.set_num_threads(os.cpu_count() or 1)
    write_configs(options.folder / "configs")
    encoder, tokenizer = TextEncoder(options.folder / "configs"), PromptTokenizer(options.folder / "configs")
    matrices, rest = split_parameters(encoder, ADAMW)
    groups = [{"params": matrices, "matrices": True, "peak": options.rate}, {"params": rest, "peak": 3e-3}]
    run = Run(options.folder / "text_encoder", encoder, Muon(groups))
    started, losses = time.monotonic(), []
    while run.step < options.steps:
        losses.append(train_step(encoder, tokenizer, run.step))
        run.advance(learning_rate(run.step, options.steps))
        if run.step % 50 == 0:
            seconds = round(time.monotonic() - started, 1)
            run.log({"step": run.step, "loss": round(float(np.mean(losses)), 4), "seconds": seconds})
            losses.clear()
    run.save()


def train_step(encoder: TextEncoder, tokenizer: PromptTokenizer, step: int) -> float:
    """Accumulate the gradients of one batch of examples; returns the loss."""
    rng = np.random.default_rng([1, step])
    torch.manual_seed(step)
    shapes = list(SHAPES)
    shape = shapes[rng.choice(len(shapes), p=list(SHAPES.values()))]
    examples = [draw_training_example(rng, shape) for _ in range(BATCH)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder(tokenizer.batch(examples))
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
