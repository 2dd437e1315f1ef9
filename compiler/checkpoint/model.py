"""What the runtime must know of a checkpoint: its constants, read from its configs into the manifest's model record."""

from typing import Any

from qie.compiler.checkpoint import processor, scheduler
from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.configs import TransformerConfig, VaeConfig, VisionConfig
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.recipe.schema import Recipe, Schedule
from qie.engines.bundle.manifest import ModelRecord, ModulationRecord
from qie.engines.bundle.specs import Areas, PromptSpec, RotarySpec, SchedulerSpec, VisionSpec
from qie.engines.errors import CheckpointError
from qie.engines.inputs.prompt import PREFIX_TOKENS, check_prefix

__all__ = [
    "CONDITION_AREA",
    "VAE_AREA",
    "areas",
    "check_parts",
    "model_record",
    "prompt_spec",
    "rotary_spec",
    "scheduler_spec",
    "schedules",
    "vision_spec",
]

VAE_AREA = 1024 * 1024
CONDITION_AREA = 384 * 384
"""Pixels (pipeline_qwenimage_edit_plus.py, VAE_IMAGE_SIZE and CONDITION_IMAGE_SIZE)."""


def areas(checkpoint: Checkpoint) -> Areas:
    """The image areas of the checkpoint: the pipeline's, or those that a small model names in model_index.json.

    Raises:
        CheckpointError: "_qie" in model_index.json is malformed.
    """
    own = _own(checkpoint)
    return Areas(
        vae_area=own.get("vae_area", VAE_AREA),
        condition_area=None if checkpoint.pipeline == "edit" else own.get("condition_area", CONDITION_AREA),
    )


def schedules(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Schedule, ...]:
    """The schedules of a build, the first being the default of its edits: the model's own, then the recipe's.

    Raises:
        CheckpointError: "_qie" in model_index.json is malformed.
    """
    own = _own(checkpoint).get("schedule")
    return recipe.schedules if own is None else (Schedule(**own), *recipe.schedules)


def _own(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model that is not one of the published ones says of itself, under "_qie" in model_index.json."""
    own = checkpoint.model_index.get("_qie", {})
    area, schedule = {"vae_area", "condition_area"}, {"steps", "guidance"}
    if (
        not isinstance(own, dict)
        or not own.keys() <= area | {"schedule", "about"}
        or not isinstance(own.get("about", ""), str)
        or not all(_is_count(own[key], 32 * 32) for key in area & own.keys())
    ):
        raise CheckpointError(
            f"model_index.json: _qie = {own!r}; expected vae_area and condition_area, both at least 1024 pixels, "
            "schedule and about, or no _qie"
        )
    mine = own.get("schedule")
    if mine is not None and not (
        isinstance(mine, dict)
        and mine.keys() == schedule
        and _is_count(mine["steps"], 1)
        and isinstance(mine["guidance"], int | float)
        and 1 <= mine["guidance"] <= 100
    ):
        raise CheckpointError(
            f"model_index.json: _qie.schedule = {mine!r}; expected steps, at least 1, and guidance, from 1 to 100"
        )
    return own


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def scheduler_spec(checkpoint: Checkpoint) -> SchedulerSpec:
    """The checkpoint's noise schedule."""
    return scheduler.scheduler_spec(checkpoint.scheduler)


def vision_spec(checkpoint: Checkpoint) -> VisionSpec:
    """How pictures are prepared for the vision tower."""
    return processor.vision_spec(checkpoint.text_encoder["vision_config"], checkpoint.preprocessor)


def prompt_spec(checkpoint: Checkpoint) -> PromptSpec:
    """What prompts depend on."""
    return PromptSpec(
        pipeline=checkpoint.pipeline,
        image_token_id=checkpoint.text_encoder["image_token_id"],
        merge_size=VisionConfig.from_config(checkpoint.text_encoder).merge_size,
    )


def rotary_spec(checkpoint: Checkpoint) -> RotarySpec:
    """The transformer's rotary embedding."""
    return RotarySpec(axes_dims=TransformerConfig.from_config(checkpoint.transformer).axes_dims)


def check_parts(checkpoint: Checkpoint) -> None:
    """See that the parts of ``checkpoint`` belong together; configs and tokenizer alone are read.

    Raises:
        CheckpointError: a config is incomplete, parts do not belong together, or the vocabulary is another one than
            that for which the template and the pipeline were made.
    """
    vision = VisionConfig.from_config(checkpoint.text_encoder)
    transformer = TransformerConfig.from_config(checkpoint.transformer)
    vae = VaeConfig.from_config(checkpoint.vae)
    if vision.out_width != transformer.joint_width:
        raise CheckpointError(
            f"the text encoder is {vision.out_width} wide, the transformer expects {transformer.joint_width}; "
            "they are parts of different models"
        )
    if transformer.in_channels != 4 * vae.z_dim:
        raise CheckpointError(
            f"the transformer takes {transformer.in_channels} channels a token, the VAE makes {4 * vae.z_dim}; "
            "they are parts of different models"
        )
    vision_spec(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    prefix = check_prefix(tokenizer)
    if prefix != PREFIX_TOKENS:
        raise CheckpointError(
            f"the tokenizer splits the template's prefix into {prefix} tokens, the pipeline drops {PREFIX_TOKENS}; "
            "restore the tokenizer of the checkpoint"
        )
    found, expected = checkpoint.text_encoder.get("image_token_id"), tokenizer.token_to_id("<|image_pad|>")
    if found != expected:
        raise CheckpointError(
            f"text_encoder/config.json: image_token_id = {found!r}, but <|image_pad|> is {expected} in the tokenizer; "
            "take both from the same checkpoint"
        )


def model_record(checkpoint: Checkpoint, *, digest: str, modulation: ModulationRecord) -> ModelRecord:
    """The model record of a ``checkpoint`` whose parts belong together (``check_parts``).

    Raises:
        CheckpointError: a config is incomplete.
    """
    return ModelRecord(
        name=checkpoint.name,
        revision=checkpoint.revision,
        digest=digest,
        pipeline=checkpoint.pipeline,
        areas=areas(checkpoint),
        scheduler=scheduler_spec(checkpoint),
        vision=vision_spec(checkpoint),
        prompt=prompt_spec(checkpoint),
        rotary=rotary_spec(checkpoint),
        latent_channels=VaeConfig.from_config(checkpoint.vae).z_dim,
        modulation=modulation,
        about=_own(checkpoint).get("about"),
    )
