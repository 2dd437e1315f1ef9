"""Exponential moving averages of weights, and the file in which a training keeps them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["STATE", "WeightAverage", "averaged_weights", "start_from"]

DECAY = 0.998
"""Decay of the moving average per step."""

STATE = "state.pt"
"""File name of the state of a training: ``model``, ``optimizer``, ``mean``, ``count`` and ``step``."""


class WeightAverage:
    """An exponential moving average of a model's parameters, bias-corrected as Adam corrects its moments.

    Attributes:
        mean: parameter name -> average before the correction.
        count: number of updates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 0
        self.mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        for name, parameter in self.model.named_parameters():
            self.mean[name].lerp_(parameter.detach(), 1 - DECAY)

    def weights(self) -> dict[str, Tensor]:
        return _corrected(self.mean, self.count)


def averaged_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights of the training in ``folder``, and the number of its steps."""
    state = torch.load(folder / STATE, weights_only=True)
    return _corrected(state["mean"], state["count"]), state["step"]


def start_from(folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
    """Write the state of a training that has reached ``weights`` in ``step`` steps, without an optimizer's state."""
    folder.mkdir(parents=True)
    mean = {name: value * (1 - DECAY) for name, value in weights.items()}
    torch.save({"model": dict(weights), "mean": mean, "count": 1, "step": step}, folder / STATE)


def _corrected(mean: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The average after ``count`` updates without its initial zeros."""
    return {name: value / (1 - DECAY**count) for name, value in mean.items()}
