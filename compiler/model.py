"""What the runtime must know of a checkpoint: its constants, read from its configs into the manifest's model record."""

from qie.compiler.checkpoint import Checkpoint
from qie.compiler.configs import TransformerConfig, VaeConfig, VisionConfig
from qie.compiler.tokenizer import load_tokenizer
from qie.engines.errors import CheckpointError
from qie.engines.image import Areas
from qie.engines.latents import RotarySpec
from qie.engines.manifest import ModelRecord, ModulationRecord
from qie.engines.prompt import PREFIX_TOKENS, PromptSpec, check_prefix
from qie.engines.schedule import SchedulerSpec
from qie.engines.vision import VisionSpec

__all__ = ["areas", "model_record", "scheduler_spec"]

VAE_AREA = 1024 * 1024
CONDITION_AREA = 384 * 384
"""Pixels (pipeline_qwenimage_edit_plus.py, VAE_IMAGE_SIZE and CONDITION_IMAGE_SIZE)."""


def areas(checkpoint: Checkpoint) -> Areas:
    """The image areas of the checkpoint: the pipeline's, or those that a small model names in model_index.json.

    Raises:
        CheckpointError: "_qie" in model_index.json is malformed.
    """
    own = checkpoint.model_index.get("_qie", {})
    values = {"vae_area": VAE_AREA, "condition_area": CONDITION_AREA} | own
    for key, value in values.items():
        if key not in ("vae_area", "condition_area") or not isinstance(value, int) or value < 32 * 32:
            raise CheckpointError(
                f"model_index.json: _qie.{key} = {value!r}; expected vae_area and condition_area, both at least "
                "1024 pixels"
            )
    return Areas(
        vae_area=values["vae_area"],
        condition_area=None if checkpoint.pipeline == "edit" else values["condition_area"],
    )


def scheduler_spec(checkpoint: Checkpoint) -> SchedulerSpec:
    """The checkpoint's noise schedule."""
    return SchedulerSpec.from_config(checkpoint.scheduler)


def model_record(checkpoint: Checkpoint, *, digest: str, modulation: ModulationRecord) -> ModelRecord:
    """The model record of ``checkpoint``.

    Raises:
        CheckpointError: a config is incomplete, parts do not belong together, or the vocabulary splits the template
            into another number of tokens than the pipeline drops.
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
    prefix = check_prefix(load_tokenizer(checkpoint))
    if prefix != PREFIX_TOKENS:
        raise CheckpointError(
            f"the tokenizer splits the template's prefix into {prefix} tokens, the pipeline drops {PREFIX_TOKENS}; "
            "restore the tokenizer of the checkpoint"
        )
    if "image_token_id" not in checkpoint.text_encoder:
        raise CheckpointError("text_encoder/config.json has no 'image_token_id'; restore the checkpoint's config")
    return ModelRecord(
        name=checkpoint.name,
        revision=checkpoint.revision,
        digest=digest,
        pipeline=checkpoint.pipeline,
        areas=areas(checkpoint),
        scheduler=scheduler_spec(checkpoint),
        vision=VisionSpec.from_configs(checkpoint.text_encoder["vision_config"], checkpoint.preprocessor),
        prompt=PromptSpec(
            pipeline=checkpoint.pipeline,
            image_token_id=checkpoint.text_encoder["image_token_id"],
            merge_size=vision.merge_size,
        ),
        rotary=RotarySpec(axes_dims=transformer.axes_dims),
        latent_channels=vae.z_dim,
        modulation=modulation,
    )
