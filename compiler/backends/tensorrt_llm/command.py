"""The command that builds an engine of TensorRT-LLM from a checkpoint.

Flags: TensorRT-LLM 1.2.1, commands/build.py and plugin/plugin.py. Its guide to build options recommends the GEMM plugin
for bfloat16 and TensorRT's own kernels for FP8, except for a few tokens at a time.
"""

from pathlib import Path

from qie.compiler.recipe.schema import SchemeName

__all__ = ["ENCODER_CLASS", "ENCODER_FILE", "ENCODER_SOURCE", "build_command"]

ENCODER_FILE = "encoder.py"
"""Name of the model class's file in a checkpoint."""

ENCODER_SOURCE = Path(__file__).with_name(ENCODER_FILE)
"""The file that is copied there. It imports tensorrt_llm, so that qie does not import it."""

ENCODER_CLASS = "TextEncoder"

_LEAST_TOKENS = 32
"""Tokens of a block: TensorRT-LLM raises a smaller limit to it (builder.py, check_max_num_tokens)."""

_LEAST_ROWS = 2
"""Rows of the prompt table: kernels are chosen for half of them, which must be 1 at least (models/generation_mixin.py,
prepare_basic_inputs)."""


def build_command(
    checkpoint: Path,
    engine: Path,
    *,
    prompt_tokens: int,
    image_tokens: int,
    tuned_tokens: int,
    scheme: SchemeName,
    program: str = "trtllm-build",
    model_class: Path | None = None,
) -> list[str]:
    """The program and its arguments, for one prompt at a time.

    All GPUs' engines are built one after the other on one GPU: the model class is known to one process only.

    Args:
        checkpoint: folder with config.json, the tensors and ENCODER_FILE.
        engine: folder of the engine; it is made if it does not exist.
        prompt_tokens: tokens of the longest prompt, those of the images included.
        image_tokens: tokens of the images of that prompt; rows of the prompt table.
        tuned_tokens: tokens for which kernels are chosen.
        scheme: quantization scheme of the checkpoint, whose other tensors are bfloat16.
        program: name or path of trtllm-build.
        model_class: file of the model class; None for that of the checkpoint.
    """
    longest = max(prompt_tokens, _LEAST_TOKENS)
    flags: dict[str, str | int] = {
        "checkpoint_dir": str(checkpoint),
        "output_dir": str(engine),
        "model_cls_file": str(model_class or checkpoint / ENCODER_FILE),
        "model_cls_name": ENCODER_CLASS,
        "max_batch_size": 1,
        "max_beam_width": 1,
        "max_input_len": longest,
        "max_seq_len": longest,
        "max_num_tokens": longest,
        "opt_num_tokens": min(max(tuned_tokens, 1), longest),
        "max_prompt_embedding_table_size": max(image_tokens, _LEAST_ROWS),
        "kv_cache_type": "disabled",
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": "disable",
        "use_fp8_context_fmha": "disable",  # attention stays in bfloat16
        "gpt_attention_plugin": "bfloat16",
        "gemm_plugin": "disable" if scheme == "fp8" else "bfloat16",
        "output_timing_cache": str(engine / "model.cache"),
        "workers": 1,
    }
    return [program, *(text for flag, value in flags.items() for text in (f"--{flag}", str(value)))]
