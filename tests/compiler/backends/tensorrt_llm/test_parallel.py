"""Tensors split over GPUs: joined again they are those of one GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.tensors import modules, tensors
from tests.support.language_weights import LANGUAGE, language_settings, language_weights, stored

SPLIT_INPUTS = ("attention.dense", "mlp.proj")
SAME_EVERYWHERE = ("layernorm.weight", "ln_f.weight", "vocab_embedding.weight", "activation_scaling_factor")
HEAD = LANGUAGE.head_dim


def join(name: str, parts: list[np.ndarray], scheme: str) -> np.ndarray:
    """What one GPU has under ``name``, from the parts of several."""
    module, _, kind = name.rpartition(".")
    if name.endswith(SAME_EVERYWHERE) or parts[0].shape == (1,):
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0]
    if module.endswith(SPLIT_INPUTS):
        if parts[0].ndim == 2:
            return np.concatenate(parts, 1)
        if kind == "prequant_scaling_factor":
            return np.concatenate(parts)
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0]
    if kind == "prequant_scaling_factor":
        return parts[0]
    if not module.endswith("attention.qkv"):
        return np.concatenate(parts)
    pack = 2 if scheme == "w4a16" and kind == "weight" else 1
    query, key = LANGUAGE.heads * HEAD // len(parts) // pack, LANGUAGE.kv_heads * HEAD // len(parts) // pack
    pieces = [np.split(part, [query, query + key]) for part in parts]
    return np.concatenate([piece[number] for number in range(3) for piece in pieces])


@pytest.mark.parametrize(("scheme", "gpus"), [("none", 4), ("fp8", 4), ("int8-smooth", 4), ("w4a16", 4), ("fp8", 2)])
def test_parts_join_to_the_whole(tmp_path: Path, scheme: Any, gpus: int) -> None:
    whole, split = language_settings(scheme=scheme), language_settings(scheme=scheme, tensor_parallel=gpus)
    for name, settings in (("whole", whole), ("split", split)):
        (tmp_path / name).mkdir()
        write_checkpoint(settings, language_weights(settings), tmp_path / name)
    expected = stored(tmp_path / "whole/rank0.safetensors")
    ranks = [stored(tmp_path / f"split/rank{rank}.safetensors") for rank in range(gpus)]
    shapes = {tensor.name: tensor.shape for module in modules(split) for tensor in tensors(module, split)}
    for rank in ranks:
        assert {name: value.shape for name, value in rank.items()} == shapes
    for name, value in expected.items():
        joined = join(name, [rank[name] for rank in ranks], scheme)
        assert joined.dtype == value.dtype and np.array_equal(joined.view(np.uint8), value.view(np.uint8)), name


def test_a_gpu_has_some_of_queries_keys_and_values(tmp_path: Path) -> None:
    settings = language_settings(tensor_parallel=4, dtype="float32")
    source = language_weights(settings)
    write_checkpoint(settings, source, tmp_path)
    found = stored(tmp_path / "rank2.safetensors")["transformer.layers.0.attention.qkv.bias"]
    parts = [source.read(f"language_model.layers.0.self_attn.{part}_proj.bias") for part in "qkv"]
    assert np.array_equal(found, np.concatenate([parts[0][256:384], parts[1][128:192], parts[2][128:192]]))
