"""The command line of ``trtllm-build``, and the ``build_config`` that comes of it.

Sources: commands/build.py (``parse_arguments``, ``main``), plugin/plugin.py (``add_plugin_argument``: names, choices
and defaults), builder.py (defaults of BuildConfig; ``check_max_num_tokens``; what is switched off in ``init_optim``).
"""

import argparse
from typing import Any

from tests.support.trtllm.config import Config

DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
PLUGINS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "bert_attention_plugin": ("auto", DTYPES),
    "gpt_attention_plugin": ("auto", DTYPES),
    "gemm_plugin": (None, (*DTYPES[:-1], "fp8", "nvfp4", "disable")),
    "gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "fp8_rowwise_gemm_plugin": ("disable", DTYPES),
    "lora_plugin": ("disable", DTYPES),
    "moe_plugin": ("auto", DTYPES),
    "mamba_conv1d_plugin": ("auto", DTYPES),
    "nccl_plugin": ("auto", DTYPES),
    "low_latency_gemm_plugin": ("disable", ("fp8", "disable")),
    "low_latency_gemm_swiglu_plugin": ("disable", ("fp8", "disable")),
    "gemm_allreduce_plugin": ("disable", ("float16", "bfloat16", "disable")),
}
SWITCHES = {
    "dora_plugin": "disable",
    "context_fmha": "enable",
    "bert_context_fmha_fp32_acc": "disable",
    "remove_input_padding": "enable",
    "norm_quant_fusion": "disable",
    "reduce_fusion": "disable",
    "user_buffer": "disable",
    "use_paged_context_fmha": "enable",
    "use_fp8_context_fmha": "enable",
    "fuse_fp4_quant": "disable",
    "multiple_profiles": "disable",
    "paged_state": "enable",
    "streamingllm": "disable",
    "use_fused_mlp": "enable",
    "pp_reduce_scatter": "disable",
}
NUMBERS: dict[tuple[str, ...], int | None] = {
    ("max_batch_size",): 2048,
    ("max_input_len",): 1024,
    ("max_seq_len", "max_decoder_seq_len"): None,
    ("max_beam_width",): 1,
    ("max_num_tokens",): 8192,
    ("opt_num_tokens",): None,
    ("max_encoder_input_len",): 1024,
    ("max_prompt_embedding_table_size", "max_multimodal_len"): 0,
    ("workers",): 1,
    ("max_lora_rank",): 64,
    ("max_draft_len",): 0,
    ("tokens_per_block",): 32,
}
TEXTS = {
    "checkpoint_dir": None,
    "model_config": None,
    "build_config": None,
    "model_cls_file": None,
    "model_cls_name": None,
    "output_dir": "engine_outputs",
    "input_timing_cache": None,
    "output_timing_cache": "model.cache",
    "visualize_network": None,
}
FLAGS = (
    "strip_plan",
    "weight_sparsity",
    "weight_streaming",
    "fast_build",
    "enable_debug_output",
    "dry_run",
    "monitor_memory",
    "gather_context_logits",
    "gather_generation_logits",
    "gather_all_token_logits",
)
CHOICES = {
    "profiling_verbosity": ("layer_names_only", ("layer_names_only", "detailed", "none")),
    "log_level": ("info", ("internal_error", "fatal", "error", "warning", "info", "verbose", "debug", "trace")),
    "logits_dtype": (None, ("float16", "float32")),
    "lora_ckpt_source": ("hf", ("hf", "nemo")),
    "speculative_decoding_mode": (
        None,
        ("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"),
    ),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="trtllm-build", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, text in TEXTS.items():
        made.add_argument(f"--{name}", type=str, default=text)
    for names, number in NUMBERS.items():
        made.add_argument(*(f"--{name}" for name in names), dest=names[0], type=int, default=number)
    for name in FLAGS:
        made.add_argument(f"--{name}", action="store_true", default=False)
    made.add_argument("--kv_cache_type", type=parse_enum, default=argparse.SUPPRESS)
    made.add_argument("--paged_kv_cache", type=str, default=argparse.SUPPRESS)
    made.add_argument("--lora_dir", type=str, default=None, nargs="+")
    made.add_argument("--lora_target_modules", type=str, default=None, nargs="+")
    switches = {name: (default, ("enable", "disable")) for name, default in SWITCHES.items()}
    for name, (chosen, choices) in {**PLUGINS, **switches, **CHOICES}.items():
        made.add_argument(f"--{name}", type=str, default=chosen, choices=choices)
    return made


def parse_enum(value: str) -> str:
    if value.lower() not in ("continuous", "paged", "disabled"):
        raise ValueError(value)
    return value.upper()


def build_config(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The part of BuildConfig that decides on the engine's inputs, after the builder's corrections."""
    batch, beams = args.max_batch_size, args.max_beam_width
    max_seq_len = args.max_seq_len if args.max_seq_len is not None else config.positions
    most = min(args.max_num_tokens, max_seq_len * batch)
    if args.context_fmha == "enable":
        most = max(most, args.tokens_per_block)
    usual = args.opt_num_tokens if args.opt_num_tokens is not None else min(batch * beams, most)
    names = (*PLUGINS, *SWITCHES, "tokens_per_block")
    plugins = {name: {"enable": True, "disable": False}.get(v := getattr(args, name), v) for name in names}
    plugins |= {name: None for name in PLUGINS if plugins[name] is False}
    plugins |= {name: config.dtype for name in PLUGINS if plugins[name] == "auto"}
    plugins["paged_kv_cache"] = getattr(args, "kv_cache_type", "PAGED") == "PAGED"
    return {
        "max_input_len": min(args.max_input_len, max_seq_len),
        "max_seq_len": max_seq_len,
        "max_batch_size": batch,
        "max_beam_width": beams,
        "max_num_tokens": most,
        "opt_num_tokens": min(usual, most),
        "max_prompt_embedding_table_size": args.max_prompt_embedding_table_size,
        "kv_cache_type": getattr(args, "kv_cache_type", "PAGED"),
        "gather_context_logits": args.gather_context_logits or args.gather_all_token_logits,
        "strongly_typed": True,
        "use_mrope": config.content["qwen_type"] == "qwen2_vl",
        "plugin_config": plugins,
    }
