"""The memory of an export is that of its largest tensor, not of the model."""

import math
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qie.compiler.backends.tensorrt_llm.checkpoint as module
from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.tensors import sources
from qie.compiler.weights.weight import Weight
from tests.support.language_weights import LANGUAGE, PUBLISHED, language_settings

BF16 = np.dtype(ml_dtypes.bfloat16)


class Made:
    """Tensors that are made when they are read."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self.weights = {weight.name: weight for weight in weights}

    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    def read(self, name: str) -> np.ndarray:
        return np.full(self.shape(name), 0.5, BF16)


@pytest.mark.parametrize("scheme", ["none", "fp8", "int8-smooth", "w4a16"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any) -> None:
    """At most six times the largest linear in float32, or the embedding as it is stored and a chunk of it."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 18)
    config = replace(LANGUAGE, layers=14, vocabulary=2048)
    settings = language_settings(config=config, scheme=scheme)
    reader = Made(sources(settings))
    largest = max(math.prod(weight.shape) * (2 if "embed" in weight.name else 6 * 4) for weight in sources(settings))
    assert largest < sum(math.prod(weight.shape) * 2 for weight in sources(settings)) / 4
    tracemalloc.start()
    try:
        write_checkpoint(settings, reader, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < largest + (1 << 21)


def test_the_published_model_fits_into_3_gb() -> None:
    """By the bound above: six times the largest linear in float32, or the embedding."""
    bytes_of = {
        weight.name: math.prod(weight.shape) * (2 if "embed" in weight.name else 6 * 4)
        for weight in sources(language_settings(config=PUBLISHED))
    }
    assert 1e9 < max(bytes_of.values()) < 2e9
