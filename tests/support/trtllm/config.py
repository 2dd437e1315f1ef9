"""config.json of a checkpoint, as ``PretrainedConfig.from_dict`` and ``QWenConfig`` read it.

Sources: tensorrt_llm/models/modeling_utils.py (PretrainedConfig, QuantConfig), models/qwen/config.py (QWenConfig),
models/qwen/model.py (``qwen_type`` and ``seq_length`` are read without a default), builder.py (mrope inputs by
``architecture``), mapping.py. Exceptions are those of the library: KeyError, TypeError, AttributeError.
"""

import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_MAP = frozenset(("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2VLModel", "QWenForCausalLM"))
"""The keys of ``MODEL_MAP`` that stand for Qwen; the others would have another config class."""

MROPE_ARCHITECTURES = frozenset(("Qwen2VLForConditionalGeneration", "Qwen2VLModel"))
QUANT_ALGOS = frozenset((None, "FP8", "W8A8_SQ_PER_CHANNEL", "W8A16", "W4A16_AWQ"))
"""Those that this reader executes."""

REQUIRED = ("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads")
QUANT_FIELDS = frozenset(
    (
        "quant_algo",
        "kv_cache_quant_algo",
        "group_size",
        "smoothquant_val",
        "clamp_val",
        "use_meta_recipe",
        "has_zero_point",
        "pre_quant_scale",
        "exclude_modules",
        "mamba_ssm_cache_dtype",
    )
)
MAPPING_FIELDS = frozenset(
    (
        "world_size",
        "rank",
        "gpus_per_node",
        "tp_size",
        "pp_size",
        "cp_size",
        "cp_config",
        "moe_cluster_size",
        "moe_tp_size",
        "moe_ep_size",
        "attn_tp_size",
        "attn_cp_size",
        "auto_parallel",
        "enable_attention_dp",
        "enable_lm_head_tp_in_adp",
    )
)
EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
            "*shared_expert_gate", "*fused_a")  # fmt: skip
"""What ``quantize_layers`` leaves out where ``exclude_modules`` is absent; a list that is given replaces it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """What the builder makes of config.json."""

    architecture: str
    dtype: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    eps: float
    positions: int
    bias: bool
    rotary_dim: int
    tp: int
    quant_algo: str | None
    group_size: int
    pre_quant_scale: bool
    excluded: tuple[str, ...] | None
    content: dict[str, Any]

    @property
    def mrope(self) -> bool:
        return self.architecture in MROPE_ARCHITECTURES

    @property
    def mrope_size(self) -> int:
        """Length of the table of one sequence: (cos, sin) of half a head for every position."""
        return self.positions * self.rotary_dim

    @property
    def kv_heads_per_rank(self) -> int:
        """Rounded up: ranks share a head where there are fewer heads than ranks (layers/attention.py)."""
        return -(-self.kv_heads // self.tp)

    def is_quantized(self, module: str) -> bool:
        """Whether ``quantize_layers`` replaces the module of this name (quantization/quantize.py)."""
        patterns = self.excluded or EXCLUDED
        return self.quant_algo is not None and not any(fnmatch.fnmatchcase(module, each) for each in patterns)


def read_config(folder: Path) -> Config:
    """config.json of ``folder``."""
    return parse_config(json.loads((folder / "config.json").read_text()))


def parse_config(content: dict[str, Any]) -> Config:
    if content["architecture"] not in MODEL_MAP:
        raise KeyError(content["architecture"])
    if missing := [key for key in REQUIRED if key not in content]:
        raise TypeError(f"PretrainedConfig.__init__() missing required keyword-only arguments: {missing}")
    quantization = content.get("quantization") or {}
    mapping = content.get("mapping") or {}
    for where, found, known in (("QuantConfig", quantization, QUANT_FIELDS), ("Mapping", mapping, MAPPING_FIELDS)):
        if unknown := found.keys() - known:
            raise TypeError(f"{where}.__init__() got an unexpected keyword argument '{sorted(unknown)[0]}'")
    for key in ("qwen_type", "seq_length"):
        if key not in content:
            raise AttributeError(f"'QWenConfig' object has no attribute '{key}'")
    heads, width = content["num_attention_heads"], content["hidden_size"]
    head_size = content.get("head_size") or width // heads
    tp, pp, world = mapping.get("tp_size", 1), mapping.get("pp_size", 1), mapping.get("world_size", 1)
    if tp * pp * mapping.get("cp_size", 1) != world:
        raise ValueError(f"world_size must equal to tp_size * pp_size * cp_size, but got {world} != {tp} * {pp}")
    unsupported = {
        "position_embedding_type": content.get("position_embedding_type") != "mrope",
        "hidden_act": content.get("hidden_act") != "silu",
        "qwen_type": content["qwen_type"] != "qwen2_vl",
        "mlp_bias": bool(content.get("mlp_bias", False)),
        "use_parallel_embedding": bool(content.get("use_parallel_embedding", False)),
        "pp_size": pp != 1,
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo") is not None,
        "quant_algo": quantization.get("quant_algo") not in QUANT_ALGOS,
        "has_zero_point": bool(quantization.get("has_zero_point", False)),
        "rotary_base": "rotary_base" not in content,
    }
    if wrong := [key for key, is_wrong in unsupported.items() if is_wrong]:
        raise ValueError(f"not the decoder of Qwen2.5-VL as an encoder: {wrong}")
    excluded = quantization.get("exclude_modules")
    return Config(
        architecture=content["architecture"],
        dtype=content["dtype"],
        layers=content["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=content.get("num_key_value_heads") or heads,
        head_size=head_size,
        intermediate=content.get("intermediate_size") or 4 * width,
        vocabulary=content["vocab_size"],
        eps=content.get("norm_epsilon", 1e-5),
        positions=content["max_position_embeddings"],
        bias=content.get("attn_bias", True),
        rotary_dim=content.get("rotary_embedding_dim") or head_size,
        tp=tp,
        quant_algo=quantization.get("quant_algo"),
        group_size=quantization.get("group_size", 128),
        pre_quant_scale=quantization.get("pre_quant_scale", False),
        excluded=tuple(excluded) if excluded is not None else None,
        content=content,
    )
