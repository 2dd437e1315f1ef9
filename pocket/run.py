"""What both trainings share: a schedule, a running mean of the weights, checkpoints to go on from, and a log."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qie.engines.files import replacing

__all__ = ["Average", "Run", "averaged", "begin", "learning_rate"]

SAVE_SECONDS = 120
DECAY = 0.998
"""Of the running mean, a step."""

STATE = "state.pt"


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak: a linear rise, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))


def averaged(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """The weights that a run in ``folder`` has come to, their running mean, and its steps."""
    state = torch.load(folder / STATE, weights_only=True)
    return _corrected(state["mean"], state["count"]), state["step"]


def begin(folder: Path, weights: dict[str, torch.Tensor], step: int) -> None:
    """Write the state of a run that has come to ``weights`` in ``step`` steps, of whose optimizer nothing is known."""
    folder.mkdir(parents=True)
    mean = {name: value * (1 - DECAY) for name, value in weights.items()}
    torch.save({"model": weights, "mean": mean, "count": 1, "step": step}, folder / STATE)


def _corrected(mean: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """A running mean of ``count`` updates without its start at zero."""
    return {name: value / (1 - DECAY**count) for name, value in mean.items()}


class Average:
    """An exponential running mean of a model's parameters, without its start (as Adam corrects its moments)."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 0
        self.mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        for name, parameter in self.model.named_parameters():
            self.mean[name].lerp_(parameter.detach(), 1 - DECAY)

    def weights(self) -> dict[str, torch.Tensor]:
        return _corrected(self.mean, self.count)


class Run:
    """One training in ``folder``: goes on where an earlier one stopped, and writes ``log.csv``."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.average = Average(model)
        self.step = 0
        self._saved = time.monotonic()
        self._file = folder / STATE
        if self._file.is_file():
            state = torch.load(self._file, weights_only=True)
            model.load_state_dict(state["model"], strict="optimizer" in state)  # a checkpoint has no more than weights
            if "optimizer" in state:
                optimizer.load_state_dict(state["optimizer"])
            self.average.mean |= state["mean"]
            self.average.count = state["count"]
            self.step = state["step"]

    def save(self) -> None:
        """Replace the checkpoint, whole or not at all."""
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
        """Apply the gradients at ``share`` of the groups' peak rates, count a step, and save now and then."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.step += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def log(self, row: Mapping[str, Any]) -> None:
        path = self.folder / "log.csv"
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
