"""torchvision without its compiled operators, for an environment in which they do not load.

vLLM imports torchvision through transformers, for a function that uses none of its operators. The torchvision of PyPI
is built for CUDA: beside a PyTorch for CPUs it ends with "operator torchvision::nms does not exist". `make test-vllm`
puts this file into the environment only where that happens. Python imports it at every start, also in vLLM's own
processes; it declares the operators as soon as torchvision is imported. With the torchvision of PyTorch's index for
CPUs it is not needed.
"""

import sys
from typing import Any


class _Declare:
    """Finds nothing, and declares the operators when it is asked for torchvision."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # declared for as long as it is held
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = self.library  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Declare())
