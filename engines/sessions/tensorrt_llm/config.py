"""The config.json that trtllm-build writes beside an engine: what a session needs of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qie.engines.errors import BundleError, first_line
from qie.engines.records import brief, is_number

__all__ = ["EngineConfig", "read_config"]

_LARGEST = 1 << 20
"""Bytes of a config.json; those of TensorRT-LLM have a few thousand."""

_MOST_TOKENS = 1 << 17
"""Tokens of a prompt: fifty times those of the longest prompt that a recipe allows."""


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
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as problem:
        raise BundleError(
            f"{path} is not the config of an engine of TensorRT-LLM ({first_line(problem)}); build the bundle again "
            "with `qie build`"
        ) from problem
    if ranks != 1:
        raise BundleError(f"{path} is of an engine for {ranks} GPUs, and an edit uses one; build it for one GPU")
    return config


def _config(model: Mapping[str, Any], built: Mapping[str, Any]) -> EngineConfig:
    section = model["rotary_scaling"]["mrope_section"]
    if not isinstance(section, list) or len(section) != 3:
        raise ValueError(f"mrope_section is {brief(section)}, expected three numbers")
    config = EngineConfig(
        layers=_whole(model, "num_hidden_layers", most=1000),
        head_dim=_whole(model, "rotary_embedding_dim", most=1 << 12),
        vocabulary=_whole(model, "vocab_size", most=1 << 24),
        rope_theta=float(_number(model, "rotary_base", least=1, most=1e12)),
        mrope_section=tuple(_whole({"mrope_section": part}, "mrope_section", most=1 << 12) for part in section),
        positions=_whole(model, "max_position_embeddings", most=_MOST_TOKENS),
        table_rows=_whole(built, "max_prompt_embedding_table_size", most=_MOST_TOKENS),
    )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise ValueError(f"mrope_section {list(config.mrope_section)} for heads of {config.head_dim} channels")
    return config


def _whole(table: Mapping[str, Any], key: str, *, most: int) -> int:
    value = _number(table, key, least=1, most=most)
    if type(value) is not int:
        raise ValueError(f"{key} is {brief(value)}, expected a whole number")
    return value


def _number(table: Mapping[str, Any], key: str, *, least: float, most: float) -> int | float:
    value = table[key]
    if not is_number(value) or not least <= value <= most:
        raise ValueError(f"{key} is {brief(value)}, expected a number from {least} to {most}")
    return value
