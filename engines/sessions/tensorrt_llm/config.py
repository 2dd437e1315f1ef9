"""The config.json that trtllm-build writes beside an engine: what a session needs of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qie.engines.errors import BundleError, first_line

__all__ = ["EngineConfig", "read_config"]

_LARGEST = 1 << 20
"""Bytes of a config.json; those of TensorRT-LLM have a few thousand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """An engine's config.json (TensorRT-LLM, builder.py, ``EngineConfig``).

    Attributes:
        layers: of the model.
        head_dim: channels of a head.
        vocabulary: rows of the embedding; ids from here on are rows of the prompt table.
        rope_theta: base of the rotary embedding.
        mrope_section: frequencies that turn with the frame, the height and the width position.
        positions: rows of the rotary table, the longest prompt in tokens.
        table_rows: most rows of the prompt table.
    """

    layers: int
    head_dim: int
    vocabulary: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    positions: int
    table_rows: int


def read_config(path: Path) -> EngineConfig:
    """Read the config.json ``path`` of an engine for one GPU.

    Raises:
        BundleError: it cannot be read, lacks a field, or is of an engine for several GPUs.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        model, built = content["pretrained_config"], content["build_config"]
        ranks = model["mapping"]["world_size"]
        config = _config(model, built)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as problem:
        raise BundleError(
            f"{path} is not the config of an engine of TensorRT-LLM ({first_line(problem)}); build the bundle again "
            "with `qie build`"
        ) from problem
    if ranks != 1:
        raise BundleError(f"{path} is of an engine for {ranks} GPUs, and an edit uses one; build it for one GPU")
    return config


def _config(model: Mapping[str, Any], built: Mapping[str, Any]) -> EngineConfig:
    config = EngineConfig(
        layers=int(model["num_hidden_layers"]),
        head_dim=int(model["rotary_embedding_dim"]),
        vocabulary=int(model["vocab_size"]),
        rope_theta=float(model["rotary_base"]),
        mrope_section=tuple(int(part) for part in model["rotary_scaling"]["mrope_section"]),
        positions=int(model["max_position_embeddings"]),
        table_rows=int(built["max_prompt_embedding_table_size"]),
    )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise ValueError(f"mrope_section {list(config.mrope_section)} for heads of {config.head_dim} channels")
    return config
