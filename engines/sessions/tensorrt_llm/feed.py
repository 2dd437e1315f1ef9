"""The inputs of TensorRT-LLM's engine from those of the language model's contract, as host arrays.

One prompt is one request in its context phase; nothing is padded, and no key or value is kept. Names, dtypes and
meaning: TensorRT-LLM 1.2.1, ``models/modeling_utils.py`` (prepare_inputs), ``models/generation_mixin.py``
(prepare_basic_inputs, prepare_attention_inputs), ``runtime/generation.py`` (_get_context_shape_buffer), and
``layers/embedding.py`` (PromptTuningEmbedding).

Shape suffixes: S prompt tokens, V image tokens, D width, P rows of the rotary table, E half a head width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.sessions.tensorrt_llm.config import EngineConfig

__all__ = ["ON_HOST", "OUTPUT", "engine_inputs", "rotary_table"]

OUTPUT = "hidden_states"
"""The engine's output, float32 [S, D]: the last hidden states after the final norm, of all tokens."""

ON_HOST = (
    "host_request_types",
    "host_context_lengths",
    "host_runtime_perf_knobs",
    "host_context_progress",
    "host_max_attention_window_sizes",
    "host_sink_token_length",
)
"""Inputs that the attention plugin reads in the host's memory."""

_KNOBS = 16
"""Length of ``host_runtime_perf_knobs``; -1 is the default of a knob."""

_MULTI_BLOCK_MODE, _FP32_ACCUMULATION = 0, 1
"""Knobs: split attention of generated tokens over blocks (the default of TensorRT-LLM; of no effect in the context
phase), and accumulate the products of attention in float32."""


def engine_inputs(feed: Mapping[str, NDArray[Any]], config: EngineConfig) -> dict[str, NDArray[Any]]:
    """Every input of the engine by name.

    Args:
        feed: ``input_ids`` int64 [1, S], ``image_embeds`` float32 [V, D], ``image_index`` int64 [1, S] and
            ``position_ids`` int64 [3, 1, S].
        config: of the engine.

    Returns:
        Arrays of the dtypes that the engine takes, but for ``prompt_embedding_table``, which is float32.
    """
    (ids_S,), (index_S,), table_VD = feed["input_ids"], feed["image_index"], feed["image_embeds"]
    tokens = len(ids_S)
    lengths = np.array([tokens], np.int32)
    knobs = np.full(_KNOBS, -1, np.int64)
    knobs[[_MULTI_BLOCK_MODE, _FP32_ACCUMULATION]] = 1
    return {
        "input_ids": np.where(index_S < 0, ids_S, config.vocabulary + index_S).astype(np.int32),
        "position_ids": np.arange(tokens, dtype=np.int32),
        "last_token_ids": lengths,
        "prompt_embedding_table": table_VD,
        "tasks": np.zeros(tokens, np.int32),
        "prompt_vocab_size": np.array([len(table_VD)], np.int32),
        "mrope_rotary_cos_sin": rotary_table(feed["position_ids"][:, 0], config),
        "mrope_position_deltas": np.zeros((1, 1), np.int32),  # read for generated tokens
        "context_lengths": lengths,
        "host_context_lengths": lengths,
        "host_request_types": np.zeros(1, np.int32),  # 0 is the context phase
        "host_runtime_perf_knobs": knobs,
        "host_context_progress": np.zeros(1, np.int64),
        "host_max_attention_window_sizes": np.full(config.layers, config.positions, np.int32),
        "host_sink_token_length": np.zeros(1, np.int32),
    }


def rotary_table(position_ids_3S: NDArray[np.int64], config: EngineConfig) -> NDArray[np.float32]:
    """``mrope_rotary_cos_sin`` float32 [1, P * 2E]: cos and sin of every frequency, side by side, token by token.

    Frequency i turns with the position of its section (mrope_section); rows behind the prompt are those of position 0
    (TensorRT-LLM, runtime/multimodal_model_runner.py, qwen2_vl).
    """
    exponent_E = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency_E = (1.0 / np.float32(config.rope_theta) ** exponent_E).astype(np.float32)
    positions_3P = np.zeros((3, config.positions), np.float32)
    positions_3P[:, : position_ids_3S.shape[1]] = position_ids_3S
    axis_E = np.repeat(np.arange(3), config.mrope_section)
    angles_PE = positions_3P[axis_E].T * frequency_E
    table_PE2 = np.stack([np.cos(angles_PE), np.sin(angles_PE)], axis=-1)
    return table_PE2.astype(np.float32).reshape(1, -1)
