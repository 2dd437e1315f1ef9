"""Recipes and LoRAs that do not fit."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.backends import BUILDERS
from tests.support.command_line import Qie, Refusal, assert_says

BAD_RECIPES: dict[str, tuple[str | None, str]] = {
    "missing": (None, "cannot read the recipe mine.toml .*; check the path"),
    "no TOML": ("gpu = ", "mine.toml is not valid TOML"),
    "unknown key": ('extends = "cpu"\ncolour = "red"', "colour.*mine.toml"),
    "unknown key in a table": ('extends = "cpu"\n[shapes]\nmax_side = 5', "shapes.max_side|max_side.*mine.toml"),
    "unknown component": ('extends = "cpu"\n[components.decoder]\nprecision = "float32"', "decoder"),
    "wrong type": ('extends = "cpu"\nmemory_gib = "lots"', "memory_gib"),
    "out of range": ('extends = "cpu"\n[[schedules]]\nsteps = 0\nguidance = 4.0', "steps"),
    "extends nothing": ('extends = "nope"', 'there is no recipe "nope"'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_recipe(qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, name: str) -> None:
    text, expected = BAD_RECIPES[name]
    if text is not None:
        Path("mine.toml").write_text(text)
    assert_says(refusal(qie("build", checkpoint, "--gpu", "mine.toml")), expected)
    assert list(qie_home.glob("bundles/*")) == []


def test_unknown_recipe(qie: Qie, refusal: Refusal, checkpoint: Path) -> None:
    assert_says(refusal(qie("build", checkpoint, "--gpu", "l40")), 'no recipe "l40"; use "l40s", or another of a100')
    assert_says(refusal(qie("recipes", "show", "nope")), 'there is no recipe "nope"; use one of a100')


def test_a_gpu_that_nothing_builds_for(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan can be printed all the same."""
    for module in ("plan", "checks"):
        monkeypatch.setattr(f"qie.compiler.planning.{module}.BUILDERS", {"onnxruntime": BUILDERS["onnxruntime"]})
    Path("small.toml").write_text('extends = "a100"\nbackends = ["tensorrt-rtx"]\n[shapes]\nmin_side = 32\n')
    message = refusal(qie("build", checkpoint, "--gpu", "small.toml"))
    assert_says(
        message,
        r"builds vision for tensorrt-rtx: this qie builds for onnxruntime; .*the recipe cpu \(--gpu\)$",
    )
    shown = qie("build", checkpoint, "--gpu", "small.toml", "--dry-run")
    assert shown.returncode == 0
    reason = "no builder: the recipe small.toml builds vision for tensorrt-rtx: this qie builds for onnxruntime"
    assert reason in " ".join(shown.stdout.split())
    assert list(qie_home.glob("bundles/*")) == []


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        ("transformer_blocks.7.attn.to_q", (64, 64), "changes layers that the checkpoint's transformer lacks"),
        ("transformer_blocks.0.attn.to_q", (32, 64), r"as \[32, 64\], but the checkpoint has \[64, 64\]"),
    ],
)
def test_lora_of_another_model(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, layer: str, shape: tuple[int, int], expected: str
) -> None:
    down, up = np.ones((4, shape[1]), np.float32), np.ones((shape[0], 4), np.float32)
    save_file({f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}, "l.safetensors")
    assert_says(refusal(qie("build", checkpoint, "--lora", "l.safetensors:0.8")), f"{expected}.*use a LoRA made for")
    assert list(qie_home.glob("bundles/*")) == []


@pytest.mark.parametrize("content", [None, b"", b"not a LoRA at all"])
def test_a_file_that_is_no_lora(qie: Qie, refusal: Refusal, checkpoint: Path, content: bytes | None) -> None:
    if content is not None:
        Path("l.safetensors").write_bytes(content)
    assert_says(
        refusal(qie("build", checkpoint, "--lora", "l.safetensors")), "l.safetensors (cannot be read|is cut short)"
    )
