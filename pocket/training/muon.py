"""Muon: momentum with orthogonalized updates for matrices, AdamW for all other parameters.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with the coefficients of its
Newton-Schulz iteration. A convolution's kernel counts as a matrix [out, in * height * width].
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonalize", "split_parameters"]


class Muon(torch.optim.Optimizer):
    """Updates groups with ``matrices=True`` by Muon and the others by AdamW; each group has its own ``lr``."""

    def __init__(self, groups: Iterable[dict[str, object]], *, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 0.0, "matrices": False, "weight_decay": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (_muon if group["matrices"] else _adam)(parameter, self.state[parameter], group)


def split_parameters(model: nn.Module, excluded: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The trainable parameters of ``model`` for Muon, and those for AdamW.

    Args:
        model: the model.
        excluded: prefixes of parameter names that go to AdamW though they are matrices.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and min(parameter.shape[:2]) > 1 and not name.startswith(excluded)
            (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


def _muon(parameter: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> None:
    gradient = parameter.grad
    assert gradient is not None
    velocity = state.setdefault("velocity", torch.zeros_like(gradient))
    velocity.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(velocity, group["momentum"]).reshape(len(gradient), -1)
    rows, columns = update.shape
    update = orthogonalize(update) * max(1.0, rows / columns) ** 0.5
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update.view_as(parameter), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """An approximation of the nearest matrix whose singular values are all 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).float()


def _adam(parameter: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> None:
    first, second, eps = 0.9, 0.99, 1e-8
    gradient = parameter.grad
    assert gradient is not None
    if not state:
        state.update(step=torch.zeros(()), mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    count = float(state["step"])
    scale = (state["square"] / (1 - second**count)).sqrt_().add_(eps)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**count))
