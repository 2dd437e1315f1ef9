"""LoRAs in the torch pipeline, read by diffusers itself, so that qie's own reader is compared with another one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qie.compiler.checkpoint.distilled import SCHEDULES, find_schedule
from qie.compiler.checkpoint.lora import Lora
from qie.engines.errors import CheckpointError

__all__ = ["fuse"]


def fuse(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add ``loras`` to the weights of a diffusers pipeline in float32, and take the scheduler of a distilled one.

    Raises:
        CheckpointError: a LoRA has layers that the transformer lacks, or of another shape; or two LoRAs are for
            different schedules.
    """
    for lora in loras:
        _fuse(pipeline, lora)
    distilled = SCHEDULES[find_schedule(None, loras)]
    if distilled is not None:
        own = pipeline.scheduler
        pipeline.scheduler = type(own).from_config(own.config, **dataclasses.asdict(distilled.scheduler))


def _fuse(pipeline: Any, lora: Lora) -> None:
    tensors, metadata = pipeline.lora_state_dict(
        str(lora.path.parent), weight_name=lora.path.name, local_files_only=True, return_lora_metadata=True
    )
    alpha = (metadata or {}).get("transformer.lora_alpha")
    for name, down in tensors.items():
        layer, is_down, _ = name.removeprefix("transformer.").partition(".lora_A.")
        if not is_down:
            continue
        up = tensors[name.replace(".lora_A.", ".lora_B.")]
        try:
            weight = pipeline.transformer.get_submodule(layer).weight
        except AttributeError:
            raise CheckpointError(
                f"{lora.path} changes {layer!r}, which the transformer lacks; use a LoRA made for this model"
            ) from None
        if weight.shape != (up.shape[0], down.shape[1]):
            raise CheckpointError(
                f"{lora.path} changes {layer!r} as {[up.shape[0], down.shape[1]]}, but the checkpoint has "
                f"{list(weight.shape)}; use a LoRA made for this model"
            )
        scale = lora.weight * (1.0 if alpha is None else alpha / down.shape[0])
        weight.data = (weight.data.float() + scale * (up.float() @ down.float())).to(weight.dtype)
