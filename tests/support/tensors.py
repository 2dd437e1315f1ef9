"""Tensors for tests of what streams weights: random ones, a reader over them, and weights that are made of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qie.compiler.weights.weight import Weight

__all__ = ["Tensors", "draw", "weight"]


class Tensors:
    """A reader over arrays, which lie in files in the order of the mapping; counts how many tensors are read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.reads = 0

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype.name

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(names), key=list(self.tensors).index))

    def read(self, name: str) -> np.ndarray:
        self.reads += 1
        return self.tensors[name]


def draw(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def weight(name: str, *shape: int, **fields: Any) -> Weight:
    return Weight(**{"name": name, "subfolder": "transformer", "shape": shape, "dtype": "float32", **fields})
