"""A small engine, built by the stand-in trtllm-build from a checkpoint made by hand."""

import subprocess
from pathlib import Path

import pytest

from tests.support.fake_gpu import Gpu
from tests.support.trtllm.build import install_command
from tests.support.trtllm.by_hand import POSITIONS, write_by_hand
from tests.support.trtllm.small import Small, prompt_of

CLASS = """\
from tensorrt_llm.models import QWenForCausalLM


class Encoder(QWenForCausalLM):
    def forward(self, input_ids, **others):
        hidden = self.transformer(input_ids)
        hidden.mark_output("hidden_states", "float32")
        return hidden
"""


@pytest.fixture(scope="session")
def decoder() -> Small:
    return prompt_of()


class Command:
    """``trtllm-build`` on one small checkpoint; ``changes`` are arguments, None leaves one out, True is a flag."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.checkpoint, self.output, self.folder = checkpoint, folder / "engine", folder
        self.path = install_command(folder / "bin", capability="8.9", tensorrt=Gpu().version)
        (folder / "encoder.py").write_text(CLASS)

    def __call__(self, **changes: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(**changes), capture_output=True, text=True, check=False)

    def words(self, **changes: object) -> list[str]:
        arguments: dict[str, object] = {
            "checkpoint_dir": self.checkpoint,
            "output_dir": self.output,
            "model_cls_file": self.folder / "encoder.py",
            "model_cls_name": "Encoder",
            "kv_cache_type": "disabled",
            "max_batch_size": 1,
            "max_input_len": POSITIONS,
            "max_seq_len": POSITIONS,
            "max_num_tokens": POSITIONS,
            "opt_num_tokens": 32,
            "max_prompt_embedding_table_size": 16,
            "output_timing_cache": self.folder / "model.cache",
            **changes,
        }
        words = [str(self.path)]
        for name, value in arguments.items():
            if value is not None:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words


@pytest.fixture
def command(decoder: Small, tmp_path: Path) -> Command:
    return Command(tmp_path, write_by_hand(tmp_path / "checkpoint", decoder))


@pytest.fixture(scope="session")
def engine(decoder: Small, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of rank0.engine."""
    folder = tmp_path_factory.mktemp("trtllm")
    command = Command(folder, write_by_hand(folder / "checkpoint", decoder))
    done = command()
    assert done.returncode == 0, done.stderr
    return (command.output / "rank0.engine").read_bytes()
