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

__all__ = ["CONDITION_AREA", "VAE_AREA", "areas", "check_parts", "model_record", "scheduler_spec"]

VAE_AREA = 1024 * 1024
CONDITION_AREA = 384 * 384
"""Pixels (pipeline_qwenimage_edit_plus.py, VAE_IMAGE_SIZE and CONDITION_IMAGE_SIZE)."""


def areas(checkpoint: Checkpoint) -> Areas:
    """The image areas of the checkpoint: the pipeline's, or those that a small model names in model_index.json.

    Raises:
        CheckpointError: "_qie" in model_index.json is malformed.
    """
    own = checkpoint.model_index.get("_qie", {})
    if not isinstance(own, dict):
        raise CheckpointError(f"model_index.json: _qie = {own!r}; expected vae_area and condition_area, or no _qie")
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
    VisionSpec.from_configs(checkpoint.text_encoder["vision_config"], checkpoint.preprocessor)
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
    vision = VisionConfig.from_config(checkpoint.text_encoder)
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
        rotary=RotarySpec(axes_dims=TransformerConfig.from_config(checkpoint.transformer).axes_dims),
        latent_channels=VaeConfig.from_config(checkpoint.vae).z_dim,
        modulation=modulation,
    )
