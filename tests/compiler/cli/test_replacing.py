"""A build that would replace another bundle is refused where nobody can be asked; a rebuild is not."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import open_bundle
from tests.support.command_line import Qie, Refusal, assert_says


@pytest.fixture
def lora(checkpoint: Path, tmp_path: Path) -> Path:
    """A LoRA of the tiny model."""
    out, inner = open_checkpoint(str(checkpoint)).reader("transformer").shape("proj_out.weight")
    down, up = np.ones((1, inner), np.float32), np.ones((out, 1), np.float32)
    save_file({"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_another_bundle_stays(
    qie: Qie, refusal: Refusal, workplace: Path, checkpoint: Path, named_bundle: str, lora: Path, tmp_path: Path
) -> None:
    before = open_bundle(named_bundle).manifest
    other = write_checkpoint(tmp_path / "other", ARCHITECTURES["tiny"])
    Path("mine.toml").write_text('extends = "cpu"')
    for words in ((other,), (checkpoint, "--lora", lora), (checkpoint, "--gpu", "mine.toml")):
        sentence = refusal(qie("build", *words, "--name", named_bundle))
        assert_says(sentence, r"bundles/mine is another bundle \(tiny, recipe cpu, .*\) and stays; choose another name")
        assert open_bundle(named_bundle).manifest == before
        assert qie("build", *words, "--name", named_bundle, "--dry-run").returncode == 0
    assert qie("build", other, "--name", named_bundle, "--overwrite").returncode == 0
    assert open_bundle(named_bundle).manifest.model.name == "other"
    assert_says(refusal(qie("build", checkpoint, "--name", named_bundle)), r"another bundle \(other, recipe cpu")


def test_a_rebuild_is_not_asked_about(qie: Qie, workplace: Path, checkpoint: Path, named_bundle: str) -> None:
    assert qie("build", checkpoint, "--name", named_bundle).returncode == 0


def test_a_lora_gets_a_bundle_of_its_own(
    qie: Qie, workplace: Path, checkpoint: Path, qie_home: Path, lora: Path
) -> None:
    assert qie("build", checkpoint).returncode == 0
    assert qie("build", checkpoint, "--lora", lora).returncode == 0
    assert sorted(path.name for path in (qie_home / "bundles").iterdir()) == ["tiny-cpu", "tiny-cpu-style"]
    again = qie("build", checkpoint, "--lora", f"{lora}:0.5", "--name", "tiny-cpu-style")
    assert again.returncode == 2 and "with style.safetensors:1" in again.stderr
