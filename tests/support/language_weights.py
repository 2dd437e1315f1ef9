"""Weights of a small language model, and the settings with which they are written for TensorRT-LLM."""

from pathlib import Path
from typing import Any

import numpy as np

from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.backends.tensorrt_llm.tensors import sources
from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.checkpoint.safetensors import open_file
from tests.support.tensors import Tensors

__all__ = ["LANGUAGE", "LINEARS", "PUBLISHED", "language_settings", "language_weights", "linears", "stored"]

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linears of a layer."""

LANGUAGE = LanguageConfig(
    layers=2,
    width=512,
    heads=8,
    kv_heads=4,
    intermediate=1024,
    vocabulary=301,
    eps=1e-6,
    rope_theta=1_000_000.0,
    mrope_section=(8, 12, 12),
)
"""The smallest that all schemes can store on four GPUs."""

PUBLISHED = LanguageConfig(
    layers=28,
    width=3584,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    eps=1e-6,
    rope_theta=1_000_000.0,
    mrope_section=(16, 24, 24),
)
"""The decoder of Qwen2.5-VL-7B-Instruct (config.json on Hugging Face)."""


def linears(config: LanguageConfig = LANGUAGE) -> tuple[str, ...]:
    """All linears that can be quantized."""
    return tuple(f"language_model.layers.{layer}.{part}" for layer in range(config.layers) for part in LINEARS)


def language_settings(**fields: Any) -> Settings:
    """Settings of LANGUAGE; a scheme quantizes all linears, whose inputs reach 1, 2, 3 and so on."""
    config = fields.get("config", LANGUAGE)
    amax = {name: 1.0 + number for number, name in enumerate(linears(config))}
    defaults: dict[str, Any] = {"config": config, "dtype": "bfloat16", "positions": 300}
    if fields.get("scheme", "none") != "none":
        defaults["amax"] = amax
    return Settings(**{**defaults, **fields})


def language_weights(settings: Settings, dtype: Any = np.float32) -> Tensors:
    """Random weights, those of each linear with another standard deviation."""
    rng = np.random.default_rng(0)
    return Tensors(
        {
            weight.name: (rng.standard_normal(weight.shape, np.float32) * (0.01 + 0.01 * rng.random())).astype(dtype)
            for weight in sources(settings)
        }
    )


def stored(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    reader = open_file(path)
    return {name: np.array(reader.read(name)) for name in reader.names()}
