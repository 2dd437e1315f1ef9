"""LoRAs in the reference are the differences that their matrices make, in every style that qie fuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from qie.compiler.checkpoint.distilled import SCHEDULES
from qie.compiler.checkpoint.lora import open_lora
from qie.compiler.metrics.error import relative_l2
from qie.compiler.validation.golden.file import Golden
from qie.compiler.validation.golden.record import record_golden
from qie.compiler.validation.reference import Reference, load_reference
from qie.engines.errors import CheckpointError
from qie.engines.inputs.schedule import sigmas

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mod.1", "norm_out.linear")
RANK = 4


def weights(reference: Reference) -> dict[str, np.ndarray[Any, Any]]:
    return {layer: reference.pipeline.transformer.get_submodule(layer).weight.numpy().copy() for layer in LAYERS}


def write_lora(style: str, reference: Reference, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A LoRA with alpha 2 in one of the styles; returns what it adds to each layer at weight 1."""
    rng, tensors, differences = np.random.default_rng(1), dict[str, np.ndarray[Any, Any]](), {}
    for layer, weight in weights(reference).items():
        outputs, inputs = weight.shape
        down = rng.standard_normal((RANK, inputs), np.float32) / np.float32(inputs**0.5)
        up = rng.standard_normal((outputs, RANK), np.float32)
        differences[layer] = 2 / RANK * up @ down
        if style == "diffusers":
            tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        else:
            name = f"lora_unet_{layer.replace('.', '_')}" if style == "kohya" else layer
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "transformer.r": 4}'}
    save_file(tensors, path, metadata if style == "diffusers" else None)
    return differences


@pytest.mark.parametrize("style", ["diffusers", "kohya", "lightning"])
def test_a_lora_adds_the_product_of_its_matrices(style: str, checkpoint: Path, tmp_path: Path) -> None:
    plain = load_reference(checkpoint)
    differences = write_lora(style, plain, tmp_path / "lora.safetensors")
    fused = load_reference(checkpoint, loras=[open_lora(tmp_path / "lora.safetensors", -0.5)])
    before, after = weights(plain), weights(fused)
    for layer in LAYERS:
        np.testing.assert_allclose(after[layer], before[layer] - 0.5 * differences[layer], atol=1e-6)
        assert relative_l2(after[layer], before[layer]) > 0.1


def test_a_distilled_lora_brings_its_scheduler(checkpoint: Path, tmp_path: Path, cases_text: Path) -> None:
    path = tmp_path / "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors"
    write_lora("lightning", load_reference(checkpoint), path)
    golden: Golden = record_golden(checkpoint, tmp_path / "golden", cases=cases_text, loras=[f"{path}:0.8"])
    (case,) = golden.cases
    schedule = SCHEDULES["lightning-4"]
    assert schedule is not None
    tokens = case.record.width * case.record.height // 256
    np.testing.assert_array_equal(case.sigmas, sigmas(schedule.scheduler, steps=4, noise_tokens=tokens))
    assert (case.record.steps, case.record.guidance) == (4, 1.0)
    assert [(lora.name, lora.weight) for lora in golden.record.loras] == [(path.name, 0.8)]


@pytest.fixture
def cases_text(tmp_path: Path) -> Path:
    """A case that leaves steps and guidance to the model."""
    from tests.support.images import smooth_image

    smooth_image(96, 64).save(tmp_path / "a.png")
    (tmp_path / "cases.toml").write_text('[[cases]]\nname = "a"\nimages = ["a.png"]\ninstruction = "make it red"\n')
    return tmp_path / "cases.toml"


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("transformer_blocks.9.attn.to_q", (64, 64), "which the transformer lacks; use a LoRA made for this model"),
        ("transformer_blocks.0.attn.to_q", (32, 64), r"as \[32, 64\], but the checkpoint has \[64, 64\]; use a LoRA"),
    ],
)
def test_a_lora_of_another_model_is_refused(
    layer: str, shape: tuple[int, int], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    outputs, inputs = shape
    down, up = np.ones((RANK, inputs), np.float32), np.ones((outputs, RANK), np.float32)
    path = tmp_path / "lora.safetensors"
    save_file({f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}, path)
    with pytest.raises(CheckpointError, match=message):
        load_reference(checkpoint, loras=[open_lora(path, 1.0)])
