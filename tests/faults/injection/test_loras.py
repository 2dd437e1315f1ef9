"""A LoRA at another weight than that of the golden file, which the manifest hides."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.record import record_golden
from qie.compiler.validation.run import Options, validate
from tests.support.bundles import build
from tests.support.faults.findings import failures, outside
from tests.support.faults.sealing import reseal

LAYER = "transformer_blocks.2.attn.to_out.0"

CASES = """
[[cases]]
name = "wide"
images = ["wide.png"]
instruction = "tint it purple"
seed = 1
steps = 2
guidance = 1.0
"""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 of one linear of block 2."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    generator = np.random.default_rng(1)
    down, up = generator.standard_normal((4, 192), np.float32), generator.standard_normal((192, 4), np.float32)
    save_file({f"transformer.{LAYER}.lora_A.weight": down / 50, f"transformer.{LAYER}.lora_B.weight": up}, path)
    return path


@pytest.fixture(scope="module")
def golden(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden file of the pocket model with the LoRA at weight 1."""
    folder = tmp_path_factory.mktemp("golden")
    Image.open(POCKET / "cases" / "wide.png").save(folder / "wide.png")
    (folder / "cases.toml").write_text(CASES)
    record_golden("pocket", folder / "golden.safetensors", cases=folder / "cases.toml", loras=[(lora, 1.0)])
    return folder / "golden.safetensors"


@pytest.mark.slow
def test_a_bundle_with_the_lora_passes(lora: Path, golden: Path, tmp_path: Path) -> None:
    path = build("pocket", tmp_path / "with-lora", loras=[(lora, 1.0)]).path
    report = validate(path, Options(level="trajectory", golden=golden, bisect=True))
    assert (report.verdict, failures(report), outside(report)) == ("passed", "", "")


@pytest.mark.slow
def test_a_lora_at_half_weight_is_found(lora: Path, golden: Path, tmp_path: Path) -> None:
    path = build("pocket", tmp_path / "half", loras=[(lora, 0.5)]).path
    honest = validate(path, Options(level="structure", golden=golden))
    assert failures(honest) == "golden file"
    reseal(path, lambda data: data["loras"][0].update(weight=1.0))
    report = validate(path, Options(level="trajectory", golden=golden, bisect=True))
    assert failures(report) == "transformer, velocity, latents, blocks"
    assert outside(report) == f"transformer_blocks.2: {LAYER}"
