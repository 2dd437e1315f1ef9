"""A stand-in for the package lpips: its signature, and stricter than it about what it is given."""

import sys
from types import ModuleType
from typing import Any

import pytest

from qie.compiler.metrics import perceptual

__all__ = ["SCALE", "install"]

SCALE = 4.0
"""The distance of the stand-in is the mean squared difference in -1 .. 1 by this."""

SMALLEST = 31
"""The real package raises RuntimeError for less: "Output size is too small"."""


def install(patch: pytest.MonkeyPatch, failure: Exception | None = None) -> list[dict[str, Any]]:
    """Put the stand-in in the place of lpips; its constructor raises ``failure``. The arguments of its calls."""
    import torch

    calls: list[dict[str, Any]] = []

    class LPIPS(torch.nn.Module):
        def __init__(
            self,
            pretrained: bool = True,
            net: str = "alex",
            version: str = "0.1",
            lpips: bool = True,
            spatial: bool = False,
            pnet_rand: bool = False,
            pnet_tune: bool = False,
            use_dropout: bool = True,
            model_path: str | None = None,
            eval_mode: bool = True,
            verbose: bool = True,
        ) -> None:
            super().__init__()
            if verbose:
                print("Setting up [LPIPS] perceptual loss")  # noqa: T201
            if net not in ("alex", "vgg", "vgg16", "squeeze"):
                raise UnboundLocalError("net_type")
            if failure is not None:
                raise failure
            assert pretrained and lpips and not (spatial or pnet_rand or pnet_tune) and eval_mode
            self.net = net
            self.weight = torch.nn.Parameter(torch.tensor(SCALE))

        def forward(
            self, in0: torch.Tensor, in1: torch.Tensor, retPerLayer: bool = False, normalize: bool = False
        ) -> torch.Tensor:
            low = 0 if normalize else -1
            for tensor in (in0, in1):
                if not isinstance(tensor, torch.Tensor):
                    raise TypeError(f"unsupported operand type(s) for -: '{type(tensor).__name__}' and 'Tensor'")
                if tensor.dtype != torch.float32:
                    raise RuntimeError(f"Input type ({tensor.dtype}) and bias type (float) should be the same")
                if tensor.ndim != 4 or tensor.shape[1] != 3:
                    raise RuntimeError(f"the input has the shape {tuple(tensor.shape)}, not [N, 3, H, W]")
                if min(tensor.shape[2:]) < SMALLEST:
                    raise RuntimeError("Output size is too small")
                assert low <= float(tensor.min()) and float(tensor.max()) <= 1
            if in0.shape != in1.shape:
                raise RuntimeError("The size of tensor a must match the size of tensor b")
            calls.append({"net": self.net, "normalize": normalize, "shape": tuple(in0.shape)})
            if normalize:
                in0, in1 = 2 * in0 - 1, 2 * in1 - 1
            return self.weight * (in0 - in1).square().mean(dim=(1, 2, 3), keepdim=True)

    module = ModuleType("lpips")
    module.LPIPS = LPIPS  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "lpips", module)
    perceptual._network.cache_clear()
    return calls
