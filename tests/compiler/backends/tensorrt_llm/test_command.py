"""The command that builds an engine, flag by flag."""

from pathlib import Path

from qie.compiler.backends.tensorrt_llm.command import ENCODER_CLASS, ENCODER_FILE, ENCODER_SOURCE, build_command

CHECKPOINT, ENGINE = Path("/b/language.tensorrt-llm"), Path("/b/language.tensorrt-llm.engine")

FLAGS = {
    "--checkpoint_dir": "/b/language.tensorrt-llm",
    "--output_dir": "/b/language.tensorrt-llm.engine",
    "--model_cls_file": "/b/language.tensorrt-llm/encoder.py",
    "--model_cls_name": "TextEncoder",
    "--max_batch_size": "1",
    "--max_beam_width": "1",
    "--max_input_len": "2624",
    "--max_seq_len": "2624",
    "--max_num_tokens": "2624",
    "--opt_num_tokens": "320",
    "--max_prompt_embedding_table_size": "1369",
    "--kv_cache_type": "disabled",
    "--remove_input_padding": "enable",
    "--context_fmha": "enable",
    "--use_paged_context_fmha": "disable",
    "--use_fp8_context_fmha": "disable",
    "--gpt_attention_plugin": "bfloat16",
    "--gemm_plugin": "bfloat16",
    "--output_timing_cache": "/b/language.tensorrt-llm.engine/model.cache",
    "--workers": "1",
}


def flags(command: list[str]) -> dict[str, str]:
    return dict(zip(command[1::2], command[2::2], strict=True))


def test_the_whole_command() -> None:
    command = build_command(CHECKPOINT, ENGINE, prompt_tokens=2624, image_tokens=1369, scheme="w4a16", tuned_tokens=320)
    assert command[0] == "trtllm-build"
    assert flags(command) == FLAGS


def test_fp8_without_the_gemm_plugin() -> None:
    command = build_command(
        CHECKPOINT, ENGINE, prompt_tokens=2624, image_tokens=1369, tuned_tokens=9999, scheme="fp8", program="/x/t"
    )
    assert command[0] == "/x/t"
    assert flags(command) == {**FLAGS, "--gemm_plugin": "disable", "--opt_num_tokens": "2624"}


def test_short_prompts_without_images() -> None:
    """TensorRT-LLM has at least a block of 32 tokens; a prompt table of 0 rows would leave out its inputs,
    and one of 1 row is tuned for 0."""
    found = flags(build_command(CHECKPOINT, ENGINE, prompt_tokens=10, image_tokens=0, tuned_tokens=10, scheme="none"))
    assert {found[f"--{name}"] for name in ("max_input_len", "max_seq_len", "max_num_tokens")} == {"32"}
    assert (found["--opt_num_tokens"], found["--max_prompt_embedding_table_size"]) == ("10", "2")


def test_another_file_with_the_model_class() -> None:
    """Finishing executes qie's own, not the one in the bundle."""
    command = build_command(
        CHECKPOINT, ENGINE, prompt_tokens=99, image_tokens=9, tuned_tokens=9, scheme="none", model_class=ENCODER_SOURCE
    )
    assert flags(command)["--model_cls_file"] == str(ENCODER_SOURCE)


def test_the_model_class_is_there() -> None:
    assert ENCODER_SOURCE.name == ENCODER_FILE
    assert f"class {ENCODER_CLASS}(" in ENCODER_SOURCE.read_text()
