"""A bundle with a fused Lightning LoRA edits as diffusers does with Lightning's documented scheduler."""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.numpy import load_file, save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.distilled import SCHEDULES
from qie.compiler.checkpoint.lora import open_lora
from qie.compiler.metrics.error import psnr_db
from qie.compiler.planning.resolve import plan_build
from qie.compiler.validation.reference import load_reference
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import CheckpointError
from qie.engines.inputs.schedule import sigmas
from tests.support.bundles import build
from tests.support.images import smooth_image

SCHEDULER = {"base_image_seq_len": 256, "base_shift": math.log(3), "max_image_seq_len": 8192, "max_shift": math.log(3),
             "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential",
             "use_dynamic_shifting": True}  # fmt: skip
"""Of Qwen-Image-Lightning, in its generate_with_diffusers.py."""

LAYERS = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "img_mlp.net.2", "img_mod.1")
TOUCHED = [f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in LAYERS]


def lightning(checkpoint: Path, path: Path) -> Path:
    """A LoRA with the keys of Lightning's files and random matrices."""
    reader = open_checkpoint(str(checkpoint)).reader("transformer")
    rng, tensors = np.random.default_rng(0), {}
    for layer in TOUCHED:
        out, inner = reader.shape(f"{layer}.weight")
        tensors[f"{layer}.lora_down.weight"] = (rng.standard_normal((4, inner)) / inner**0.5).astype(ml_dtypes.bfloat16)
        tensors[f"{layer}.lora_up.weight"] = (rng.standard_normal((out, 4)) * 0.3).astype(ml_dtypes.bfloat16)
        tensors[f"{layer}.alpha"] = np.array(4, ml_dtypes.bfloat16)
    save_file(tensors, path)
    return path


def judge(steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=math.log(3))
    return scheduler


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("tokens", [16, 60, 1024, 4096, 16384])
def test_the_sigmas_are_lightnings_at_every_size(steps: int, tokens: int) -> None:
    schedule = SCHEDULES[f"lightning-{steps}"]
    assert schedule is not None and schedule.steps == steps
    found = sigmas(schedule.scheduler, steps=steps, noise_tokens=tokens)
    assert np.array_equal(found, judge(steps).sigmas.numpy())


@pytest.mark.parametrize("steps", [4, 8])
def test_an_edit_equals_diffusers(checkpoint: Path, tmp_path: Path, steps: int) -> None:
    lora = lightning(checkpoint, tmp_path / f"Qwen-Image-Edit-2511-Lightning-{steps}steps-V1.0-bf16.safetensors")
    bundle = build(checkpoint, tmp_path / "bundle", loras=[lora])
    manifest = bundle.manifest
    assert (manifest.defaults.steps, manifest.defaults.guidance) == (steps, 1.0)
    assert manifest.model.scheduler.shift_terminal is None
    image = smooth_image(160, 96)
    ours = Editor(bundle).edit(Request(images=[image], instructions=["make it red"], seeds=[1]))
    assert (ours.steps, ours.guidance) == (steps, 1.0)

    reference = load_reference(checkpoint)
    opened = open_lora(lora, 1.0)
    for layer in TOUCHED:
        module = reference.pipeline.transformer.get_submodule(layer)
        delta = opened.delta(f"{layer}.weight", tuple(module.weight.shape))
        assert delta is not None
        module.weight.data += torch.from_numpy(delta)
    own = reference.edit([image], "make it red", cfg=1.0, steps=steps, seed=1)
    reference.pipeline.scheduler = judge(steps)
    theirs = reference.edit([image], "make it red", cfg=1.0, steps=steps, seed=1)
    result = np.asarray(ours.images[0])
    assert psnr_db(result, theirs) >= 55
    assert psnr_db(result, own) < 40  # with the checkpoint's own scheduler


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (["Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16"], None, "lightning-4"),
        (["Qwen-Image-Lightning-8steps-V2.0"], None, "lightning-8"),
        (["qwen_image_edit_lightning_4step"], None, "lightning-4"),
        (["lightning"], None, "lightning-8"),
        (["style"], None, "checkpoint"),
        ([], None, "checkpoint"),
        (["style", "Lightning-4steps"], None, "lightning-4"),
        (["Lightning-4steps"], "checkpoint", "checkpoint"),
        (["Lightning-4steps"], "lightning-8", "lightning-8"),
        (["Lightning-4steps"], "lightning", "lightning-4"),
        (["style"], "lightning", "lightning-8"),
        ([], "lightning-4", "lightning-4"),
    ],
)
def test_which_schedule(checkpoint: Path, tmp_path: Path, names: list[str], asked: str | None, expected: str) -> None:
    loras: list[Any] = [lightning(checkpoint, tmp_path / f"{name}.safetensors") for name in names]
    plan = plan_build(checkpoint, loras=loras, schedule=asked)
    assert plan.schedule == expected
    only = plan.model.schedules(plan.recipe)
    assert expected == "checkpoint" or [(s.steps, s.guidance) for s in only] == [(int(expected[-1]), 1.0)]
    assert expected != "checkpoint" or plan.model.scheduler.shift_terminal == 0.02


def test_a_lora_may_say_it_in_its_metadata(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(lightning(checkpoint, tmp_path / "a.safetensors"))
    save_file(tensors, tmp_path / "b.safetensors", metadata={"title": "Qwen Image Lightning, 4 steps"})
    assert plan_build(checkpoint, loras=[tmp_path / "b.safetensors"]).schedule == "lightning-4"


def test_schedules_that_contradict_each_other(checkpoint: Path, tmp_path: Path) -> None:
    loras = [lightning(checkpoint, tmp_path / f"Lightning-{steps}steps.safetensors") for steps in (4, 8)]
    with pytest.raises(CheckpointError, match="the LoRAs are for different schedules .*; leave one out"):
        plan_build(checkpoint, loras=loras)
    assert plan_build(checkpoint, loras=loras, schedule="lightning-4").schedule == "lightning-4"
    with pytest.raises(CheckpointError, match="there is no schedule 'turbo'; use one of checkpoint, lightning-4"):
        plan_build(checkpoint, schedule="turbo")
