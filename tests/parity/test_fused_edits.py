"""An edit with LoRAs fused at build time equals the reference's with the same differences added to its weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.editing.request import Request
from tests.support.bundles import build
from tests.support.parity import TINY, Side, images, psnr

RANK = 4
LAYERS = {
    "transformer_blocks.0.attn.to_q": 1.0,
    "transformer_blocks.0.img_mod.1": 0.2,
    "transformer_blocks.1.txt_mlp.net.0.proj": 1.0,
    "transformer_blocks.1.attn.to_out.0": 1.0,
    "norm_out.linear": 0.2,
}
"""Layers that the LoRAs touch, with the size of their difference: linears of the graph, and modulation."""


def write_loras(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Two files, in the diffusers and the kohya style; returns the difference that 0.8 and -0.5 of them make."""
    rng = np.random.default_rng(1)
    peft: dict[str, np.ndarray] = {}
    kohya: dict[str, np.ndarray] = {}
    differences = {}
    for layer, size in LAYERS.items():
        outputs, inputs = shapes[layer]
        pairs = [
            (rng.standard_normal((RANK, inputs), np.float32), size * rng.standard_normal((outputs, RANK), np.float32))
            for _ in range(2)
        ]
        pairs = [(down / inputs**0.5, up / RANK**0.5) for down, up in pairs]
        peft |= {f"transformer.{layer}.lora_A.weight": pairs[0][0], f"transformer.{layer}.lora_B.weight": pairs[0][1]}
        flat = f"lora_unet_{layer.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": pairs[1][0], f"{flat}.lora_up.weight": pairs[1][1]}
        kohya[f"{flat}.alpha"] = np.array(2.0, np.float32)
        differences[layer] = 0.8 * pairs[0][1] @ pairs[0][0] - 0.5 * (2.0 / RANK) * pairs[1][1] @ pairs[1][0]
    save_file(peft, folder / "peft.safetensors")
    save_file(kohya, folder / "kohya.safetensors")
    return differences


def test_edit_with_two_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIE_HOME", str(tmp_path / "home"))
    folder = write_checkpoint(tmp_path / "checkpoint", replace(TINY, num_layers=2), seed=3)
    reader = open_checkpoint(str(folder)).reader("transformer")
    shapes = {layer: reader.shape(f"{layer}.weight") for layer in LAYERS}
    differences = write_loras(tmp_path, shapes)

    def side(name: str, loras: tuple[tuple[str, float], ...]) -> Side:
        return Side(folder, build(folder, tmp_path / name, loras=[(tmp_path / file, weight) for file, weight in loras]))

    changed = side("changed", (("peft.safetensors", 0.8), ("kohya.safetensors", -0.5)))
    assert [(o.name, o.weight) for o in changed.bundle.manifest.loras] == [
        ("peft.safetensors", 0.8),
        ("kohya.safetensors", -0.5),
    ]
    transformer = changed.reference.pipeline.transformer
    for layer, difference in differences.items():
        transformer.get_submodule(layer).weight += torch.from_numpy(difference)

    request = Request(images=images(2), instructions=["make it red"], seeds=[1], steps=4)
    ours = changed.editor.edit(request).images[0]
    theirs = changed.reference.edit(images(2), "make it red", steps=4, seed=1)
    assert psnr(ours, theirs) >= 55
    plain = side("plain", ()).editor.edit(request).images[0]
    assert psnr(plain, theirs) < 30  # the LoRAs change the image visibly
