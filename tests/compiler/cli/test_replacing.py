"""What would replace the files of others is refused before the work; a rebuild is not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.planning.checks import other_bundle
from qie.compiler.planning.resolve import plan_build
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import open_bundle
from tests.support.command_line import Qie, Refusal, assert_says


@pytest.fixture
def lora(checkpoint: Path, tmp_path: Path) -> Path:
    """A LoRA of the tiny model."""
    return write_lora(checkpoint, tmp_path / "style.safetensors", 1)


def write_lora(checkpoint: Path, path: Path, value: float) -> Path:
    out, inner = open_checkpoint(str(checkpoint)).reader("transformer").shape("proj_out.weight")
    down, up = np.full((1, inner), value, np.float32), np.ones((out, 1), np.float32)
    save_file({"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}, path)
    return path


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


def test_another_lora_of_the_same_name(
    qie: Qie, refusal: Refusal, workplace: Path, checkpoint: Path, qie_home: Path, lora: Path
) -> None:
    assert qie("build", checkpoint, "--lora", lora).returncode == 0
    before = open_bundle("tiny-cpu-style").manifest
    Path("more").mkdir()
    other = write_lora(checkpoint, Path("more") / lora.name, 2)
    sentence = refusal(qie("build", checkpoint, "--lora", other))
    digest = before.loras[0].sha256[:8]
    assert_says(sentence, rf"with style.safetensors:1 \(sha256 {digest}\), .*\) and stays; choose another name")
    assert open_bundle("tiny-cpu-style").manifest == before
    moved = Path("more") / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert qie("build", checkpoint, "--lora", moved, "--name", "tiny-cpu-style").returncode == 0


def test_another_revision_is_another_bundle(checkpoint: Path, named_bundle: str) -> None:
    plan = plan_build(checkpoint, name=named_bundle)
    assert other_bundle(plan) is None
    revised = replace(plan, checkpoint=replace(plan.checkpoint, revision="1" * 40))
    old = other_bundle(revised)
    assert old is not None and old.manifest.model.revision is None


@pytest.mark.parametrize("content", ["make it red\n", '{"mine": 1}', "[1]", '["errors"]', "[" * 100_000, "", "\0"])
def test_a_ranking_replaces_only_a_ranking(
    qie: Qie, refusal: Refusal, workplace: Path, checkpoint: Path, content: str
) -> None:
    Path("mine").write_text(content)
    words = ("calibrate", checkpoint, "--images", ".", "--samples", "1", "--sensitivity", "-o", "c.npz")
    assert_says(refusal(qie(*words, "--ranking", "mine")), r"mine is not a ranking and would be lost; choose another")
    assert Path("mine").read_text() == content
    assert not Path("c.npz").exists()


def test_a_ranking_is_made_again(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    words = ("calibrate", checkpoint, "--images", ".", "--samples", "1", "--sensitivity", "-o", "c.npz")
    for _ in range(2):
        assert qie(*words).returncode == 0
        assert json.loads(Path("c.sensitivity.json").read_text())[0]["scheme"] == "fp8"


def test_a_link_to_itself_is_refused_before_the_work(
    qie: Qie, refusal: Refusal, workplace: Path, checkpoint: Path
) -> None:
    for name in ("loop", "loop.png"):
        Path(name).symlink_to(name)
    for words in (("build", checkpoint, "--out", "loop"), ("export", checkpoint, "-o", "loop")):
        assert_says(refusal(qie(*words)), r"loop is a link that leads back to itself; choose another folder \(--out\)")
    calibrate = ("calibrate", checkpoint, "--images", ".", "--samples", "1", "-o", "loop")
    assert_says(refusal(qie(*calibrate)), r"loop cannot be written; name a file in an existing folder \(--out\)")
    run = ("run", "photo.png", "red", "-o", "loop.png")
    assert_says(refusal(qie(*run)), r"loop.png cannot be written .*; choose another path \(--out\)")
    assert Path("loop").is_symlink() and Path("loop.png").is_symlink()
