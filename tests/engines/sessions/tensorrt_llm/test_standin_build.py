"""The stand-in for ``trtllm-build`` accepts and refuses what the real one does."""

import json
from typing import Any

import pytest

from tests.engines.sessions.tensorrt_llm.conftest import Command
from tests.support.trtllm.arguments import parser
from tests.support.trtllm.by_hand import rewrite
from tests.support.trtllm.stored import read_tensors


def test_an_engine_and_its_config(command: Command) -> None:
    done = command()
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in command.output.iterdir()) == ["config.json", "rank0.engine"]
    config = json.loads((command.output / "config.json").read_text())
    assert config["version"] == "1.2.1"
    assert config["build_config"]["kv_cache_type"] == "DISABLED"
    assert config["build_config"]["opt_num_tokens"] == 32
    assert config["build_config"]["plugin_config"]["gpt_attention_plugin"] == "float32"
    assert (command.folder / "model.cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 3}, "unrecognized arguments: --max_tokens 3"),
        ({"gemm_plugin": "enable"}, "argument --gemm_plugin: invalid choice: 'enable'"),
        ({"context_fmha": True}, "argument --context_fmha: expected one argument"),
        ({"logits_dtype": "bfloat16"}, "argument --logits_dtype: invalid choice: 'bfloat16'"),
        ({"kv_cache_type": "none"}, "argument --kv_cache_type: invalid parse_enum value: 'none'"),
        ({"max_seq_len": "many"}, "argument --max_seq_len/--max_decoder_seq_len: invalid int value: 'many'"),
    ],
)
def test_arguments_that_argparse_refuses(
    command: Command, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(command.words(**changes)[1:])
    assert f"trtllm-build: error: {message}" in capsys.readouterr().err


def test_a_refused_argument_ends_the_command(command: Command) -> None:
    done = command(max_tokens=3)
    assert (done.returncode, done.stderr.startswith("usage: trtllm-build")) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_cls_name": None}, "AssertionError"),
        ({"model_cls_name": "Missing"}, "AttributeError: module 'models' has no attribute 'Missing'"),
        ({"model_cls_file": "nowhere.py"}, "FileNotFoundError"),
        ({"checkpoint_dir": "nowhere"}, "FileNotFoundError"),
        ({"kv_cache_type": None}, "NotImplementedError: kv_cache_type is PAGED"),
    ],
)
def test_builds_that_end_with_a_traceback(command: Command, changes: dict[str, Any], message: str) -> None:
    done = command(**changes)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)


def test_a_checkpoint_without_a_tensor(command: Command) -> None:
    rewrite(command.checkpoint, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    done = command()
    assert done.returncode == 1
    assert "RuntimeError: Required but not provided tensors:{'transformer.ln_f.weight'}" in done.stderr
    assert list(command.output.iterdir()) == []


def test_a_class_that_marks_no_output(command: Command) -> None:
    (command.folder / "encoder.py").write_text("class Encoder:\n    pass\n")
    assert "at least one output" in command().stderr


def test_tokens_are_cut_to_what_one_batch_can_have(command: Command) -> None:
    assert command(max_num_tokens=8192, opt_num_tokens=None).returncode == 0
    config = json.loads((command.output / "config.json").read_text())["build_config"]
    assert (config["max_num_tokens"], config["opt_num_tokens"]) == (64, 1)


def test_the_checkpoint_may_go_once_the_engine_is_there(command: Command) -> None:
    names = read_tensors(command.checkpoint / "rank0.safetensors").keys()
    assert command().returncode == 0
    content = (command.output / "rank0.engine").read_bytes()
    assert all(name.encode() in content for name in names)
