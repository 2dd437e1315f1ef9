"""config.json, field by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.config import checkpoint_config
from tests.support.language_weights import PUBLISHED, language_settings, language_weights, linears

PUBLISHED_FIELDS = {
    "architecture": "Qwen2VLForConditionalGeneration",
    "qwen_type": "qwen2_vl",
    "dtype": "bfloat16",
    "logits_dtype": "float32",
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_size": 3584,
    "head_size": 128,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "hidden_act": "silu",
    "norm_epsilon": 1e-6,
    "position_embedding_type": "mrope",
    "max_position_embeddings": 2624,
    "rotary_embedding_dim": 128,
    "rotary_base": 1000000.0,
    "rotary_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "attn_bias": True,
    "mlp_bias": False,
    "qk_layernorm": False,
    "seq_length": 2624,
    "tie_word_embeddings": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "exclude_modules": None},
}
"""As in the facts of QWenConfig of TensorRT-LLM 1.2.1 and the config of Qwen2.5-VL-7B-Instruct."""

NEVER = ["*lm_head", "*vocab_embedding"]


def test_the_published_model() -> None:
    assert checkpoint_config(language_settings(config=PUBLISHED, positions=2624)) == PUBLISHED_FIELDS


def test_a_small_model_on_two_gpus(tmp_path: Path) -> None:
    settings = language_settings(dtype="float32", tensor_parallel=2)
    write_checkpoint(settings, language_weights(settings), tmp_path)
    changed = {
        "dtype": "float32",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "hidden_size": 512,
        "head_size": 64,
        "intermediate_size": 1024,
        "vocab_size": 301,
        "max_position_embeddings": 300,
        "rotary_embedding_dim": 64,
        "rotary_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "seq_length": 300,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
    }
    assert json.loads((tmp_path / "config.json").read_text()) == {**PUBLISHED_FIELDS, **changed}


@pytest.mark.parametrize(
    ("scheme", "fields"),
    [
        ("fp8", {"quant_algo": "FP8"}),
        ("int8-smooth", {"quant_algo": "W8A8_SQ_PER_CHANNEL"}),
        ("w8a16", {"quant_algo": "W8A16"}),
        (
            "w4a16",
            {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": False},
        ),
    ],
)
def test_quantization(scheme: Any, fields: dict[str, Any]) -> None:
    section = checkpoint_config(language_settings(scheme=scheme))["quantization"]
    assert section == {"kv_cache_quant_algo": None, "exclude_modules": NEVER, **fields}


@pytest.mark.parametrize("scheme", ["fp8", "w8a16"])
def test_excluded_linears(scheme: Any) -> None:
    """Names without wildcards, because TensorRT-LLM compares them in several ways; of W8A16 also tensors."""
    amax = {name: 1.0 for name in linears() if "0.mlp" not in name}
    names = [f"transformer.layers.0.mlp.{part}" for part in ("fc", "gate", "proj")]
    if scheme == "w8a16":
        names = [pattern for name in names for pattern in (name, f"{name}.weight")]
    section = checkpoint_config(language_settings(scheme=scheme, amax=amax))["quantization"]
    assert section["exclude_modules"] == [*NEVER, *names]


def test_a_scheme_without_linears() -> None:
    section = checkpoint_config(language_settings(scheme="fp8", amax={}))["quantization"]
    assert section == PUBLISHED_FIELDS["quantization"]
