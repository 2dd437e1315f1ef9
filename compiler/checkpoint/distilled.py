"""Schedules that a step-distilled LoRA was trained for, which are not the checkpoint's own.

A distilled LoRA makes good images only with the scheduler and the number of steps of its training, without guidance.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qie.compiler.checkpoint.lora import Lora
from qie.compiler.checkpoint.model import Model
from qie.compiler.recipe.schema import Schedule
from qie.engines.bundle.specs import SchedulerSpec
from qie.engines.errors import CheckpointError

__all__ = ["CHECKPOINT", "SCHEDULES", "Distilled", "distilled_model", "find_schedule"]

CHECKPOINT = "checkpoint"
"""The name of the checkpoint's own schedule."""

_LIGHTNING = SchedulerSpec(
    use_dynamic_shifting=True,
    base_shift=math.log(3),
    max_shift=math.log(3),
    base_image_seq_len=256,
    max_image_seq_len=8192,
    shift_terminal=None,
)
"""The scheduler_config of Qwen-Image-Lightning's README and generate_with_diffusers.py: a shift of 3 at every size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """A schedule of a distillation, without guidance.

    Attributes:
        scheduler: its constants.
        steps: denoising steps.
    """

    scheduler: SchedulerSpec
    steps: int


SCHEDULES: dict[str, Distilled | None] = {
    CHECKPOINT: None,
    "lightning-4": Distilled(scheduler=_LIGHTNING, steps=4),
    "lightning-8": Distilled(scheduler=_LIGHTNING, steps=8),
}
"""Name of a schedule -> what it is; None for the checkpoint's own."""

_STEPS = re.compile(r"(\d+)[ _-]?steps?\b|\b(\d+)step", re.IGNORECASE)


def find_schedule(name: str | None, loras: Sequence[Lora]) -> str:
    """The name of the schedule that ``name`` asks for or, where it is None, that the LoRAs say.

    "lightning" is the one whose number of steps is in the names of the LoRAs, or 8. A LoRA says its schedule in its
    metadata or its file's name: Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors.

    Raises:
        CheckpointError: there is no such schedule, or two LoRAs are for different ones.
    """
    if name is not None and name != "lightning":
        if name not in SCHEDULES:
            raise CheckpointError(
                f"there is no schedule {name!r}; use one of {', '.join(SCHEDULES)}, or lightning", option="schedule"
            )
        return name
    found = {lora.name: said for lora in loras if (said := _said_by(lora)) is not None}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{lora} for {schedule}" for lora, schedule in found.items())
        raise CheckpointError(f"the LoRAs are for different schedules ({said}); leave one out", option="schedule")
    return next(iter(found.values()), CHECKPOINT if name is None else "lightning-8")


def distilled_model(model: Model, schedule: str) -> Model:
    """``model`` with the schedule of that name as its only one."""
    distilled = SCHEDULES[schedule]
    if distilled is None:
        return model
    only = Schedule(steps=distilled.steps, guidance=1.0)
    return replace(model, scheduler=distilled.scheduler, schedule=only, distilled=True)


def _said_by(lora: Lora) -> str | None:
    texts = [lora.path.stem, *lora.reader.metadata.values()]
    if not any("lightning" in text.lower() for text in texts):
        return None
    for text in texts:
        for match in _STEPS.finditer(text):
            name = f"lightning-{match[1] or match[2]}"
            if name in SCHEDULES:
                return name
    return "lightning-8"
