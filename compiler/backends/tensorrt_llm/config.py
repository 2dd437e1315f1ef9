"""The config.json of a TensorRT-LLM checkpoint.

Its fields are arguments of QWenConfig (TensorRT-LLM 1.2.1, models/qwen/config.py and models/modeling_utils.py); an
unknown field of ``quantization`` or ``mapping`` is an error there.
"""

from typing import Any

from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.backends.tensorrt_llm.tensors import excluded_modules

__all__ = ["CONFIG_FILE", "checkpoint_config"]

CONFIG_FILE = "config.json"

_NEVER_QUANTIZED = ("*lm_head", "*vocab_embedding")
"""Patterns that replace TensorRT-LLM's own, which are not used where a checkpoint has patterns."""


def checkpoint_config(settings: Settings) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ExportError: the sizes of the model cannot be split over the GPUs, or quantized.
        RecipeError: only some of the linears that TensorRT-LLM fuses are quantized.
    """
    config, gpus = settings.config, settings.tensor_parallel
    return {
        # Only this architecture gets rotary tables with three position axes (builder.py, build). The decoder of
        # Qwen2.5-VL is that of Qwen2-VL; "qwen2_5_vl" is unknown.
        "architecture": "Qwen2VLForConditionalGeneration",
        "qwen_type": "qwen2_vl",
        "dtype": settings.dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.width,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocabulary,
        "hidden_act": "silu",
        "norm_epsilon": config.eps,
        "position_embedding_type": "mrope",
        "max_position_embeddings": settings.positions,
        "rotary_embedding_dim": config.head_dim,
        "rotary_base": config.rope_theta,
        "rotary_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "attn_bias": True,
        "mlp_bias": False,
        "qk_layernorm": False,
        "seq_length": settings.positions,
        "tie_word_embeddings": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": gpus, "tp_size": gpus, "pp_size": 1},
        "quantization": _quantization(settings),
    }


def _quantization(settings: Settings) -> dict[str, Any]:
    algorithm, excluded = settings.format.quant_algo, excluded_modules(settings)
    if algorithm is None:
        return {"quant_algo": None, "kv_cache_quant_algo": None, "exclude_modules": None}
    if algorithm == "W8A16":  # modules are compared with these patterns, and tensors too (convert_utils.py)
        excluded = tuple(pattern for name in excluded for pattern in (name, f"{name}.weight"))
    fields: dict[str, Any] = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": [*_NEVER_QUANTIZED, *excluded],
    }
    weights = settings.format.weights
    if weights is not None and weights.per == "group":
        fields |= {"group_size": weights.group_size, "has_zero_point": False, "pre_quant_scale": False}
    return fields
