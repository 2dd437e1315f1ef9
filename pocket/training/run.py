"""What the trainings share: a learning rate schedule, resuming, averaged weights, and a log."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocket.model.averages import STATE, WeightAverage
from qie.engines.files import replacing

__all__ = ["Run", "learning_rate"]

SAVE_SECONDS = 120
"""Seconds between two checkpoints."""


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warmup, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


class Run:
    """One training in ``folder``: resumes from its last checkpoint, and writes ``log.csv``.

    Attributes:
        step: number of steps so far.
        average: the averaged weights.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.average = WeightAverage(model)
        self.step = 0
        self._saved = time.monotonic()
        self._file = folder / STATE
        if self._file.is_file():
            state = torch.load(self._file, weights_only=True)
            resumable = "optimizer" in state  # a state made from a checkpoint has weights only, and no auxiliary heads
            model.load_state_dict(state["model"], strict=resumable)
            if resumable:
                optimizer.load_state_dict(state["optimizer"])
            self.average.mean |= state["mean"]
            self.average.count = state["count"]
            self.step = state["step"]

    def save(self) -> None:
        """Replace the checkpoint on disk, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.average.mean,
            "count": self.average.count,
            "step": self.step,
        }
        with replacing(self._file) as temporary:
            torch.save(state, temporary)
        self._saved = time.monotonic()

    def advance(self, share: float) -> None:
        """Apply the gradients with ``share`` of each group's peak learning rate; save every SAVE_SECONDS."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.step += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def log(self, row: Mapping[str, Any]) -> None:
        """Append ``row`` to the log, and print it."""
        path = self.folder / "log.csv"
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
