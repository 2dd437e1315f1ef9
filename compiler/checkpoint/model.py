"""The model of a checkpoint: everything that its configs say, parsed once when the checkpoint is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qie.compiler.checkpoint.configs import LanguageConfig, TransformerConfig, VaeConfig, VisionConfig
from qie.compiler.checkpoint.processor import parse_processor
from qie.compiler.checkpoint.scheduler import parse_scheduler
from qie.compiler.recipe.schema import REFERENCES_MAX, Recipe, Schedule
from qie.engines.bundle.specs import Areas, PromptSpec, RotarySpec, SchedulerSpec, ShapeLimits, VisionSpec
from qie.engines.errors import CheckpointError
from qie.engines.records import brief

__all__ = ["CONDITION_AREA", "PIPELINES", "VAE_AREA", "Model", "Pipeline", "parse_model"]

AREA_MAX = 1 << 26
"""Largest area in square pixels that a model may be made for."""

ABOUT_MAX = 2000
"""Characters of a model's note."""

VAE_AREA = 1024 * 1024
CONDITION_AREA = 384 * 384
"""Pixels (pipeline_qwenimage_edit_plus.py, VAE_IMAGE_SIZE and CONDITION_IMAGE_SIZE)."""

Pipeline = Literal["edit", "edit_plus"]
"""Which of the two pipelines a checkpoint was made for: they differ in template, image areas and number of images."""

PIPELINES: dict[str, Pipeline] = {"QwenImageEditPipeline": "edit", "QwenImageEditPlusPipeline": "edit_plus"}
"""``_class_name`` of model_index.json to pipeline (diffusers, pipelines/qwenimage)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Everything that the configs of a checkpoint say.

    Attributes:
        pipeline: the diffusers pipeline that the checkpoint was made for.
        transformer, vision, language, vae: dimensions of the components.
        processor: how the host prepares images for the vision tower.
        scheduler: the options that decide the sigmas of an edit.
        areas: areas that images are resized to, in square pixels.
        image_token_id: token that image embeddings replace in the prompt.
        schedule: default steps and guidance of a model that is not one of the published ones, None elsewhere.
        about: what such a model tells its users, None elsewhere.
        distilled: whether ``schedule`` is the only one that its weights were trained for.
    """

    pipeline: Pipeline
    transformer: TransformerConfig
    vision: VisionConfig
    language: LanguageConfig
    vae: VaeConfig
    processor: VisionSpec
    scheduler: SchedulerSpec
    areas: Areas
    image_token_id: int
    schedule: Schedule | None = None
    about: str | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        if self.vision.out_width != self.transformer.joint_width:
            raise CheckpointError(
                f"the text encoder is {self.vision.out_width} wide, the transformer expects "
                f"{self.transformer.joint_width}; take all components from one checkpoint"
            )
        if self.transformer.in_channels != 4 * self.vae.z_dim:
            raise CheckpointError(
                f"the transformer takes {self.transformer.in_channels} channels a token, the VAE makes "
                f"{4 * self.vae.z_dim}; take all components from one checkpoint"
            )

    @property
    def prompt(self) -> PromptSpec:
        """What prompts depend on."""
        return PromptSpec(pipeline=self.pipeline, image_token_id=self.image_token_id, merge_size=self.vision.merge_size)

    @property
    def rotary(self) -> RotarySpec:
        """The transformer's rotary embedding."""
        return RotarySpec(axes_dims=self.transformer.axes_dims)

    @property
    def references_max(self) -> int:
        """Images that an edit may take: one for the Edit pipeline, up to three for Edit-Plus (their model cards)."""
        return 1 if self.pipeline == "edit" else REFERENCES_MAX

    def limits(self, recipe: Recipe) -> ShapeLimits:
        """What engines of this model built by ``recipe`` take."""
        limits = recipe.shape_limits(self.areas.vae_area)
        return replace(limits, references_max=min(limits.references_max, self.references_max))

    def schedules(self, recipe: Recipe) -> tuple[Schedule, ...]:
        """The schedules of a build, the default of its edits first: the model's own, then the recipe's."""
        if self.schedule is None:
            return recipe.schedules
        return (self.schedule,) if self.distilled else (self.schedule, *recipe.schedules)


def parse_model(
    *,
    model_index: Mapping[str, Any],
    transformer: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
) -> Model:
    """The model that the configs of a checkpoint describe; ``preprocessor`` is empty where there is none.

    Raises:
        CheckpointError: a config is incomplete or malformed, or the components do not belong together.
        ExportError: the model uses an option that the graphs do not express.
    """
    pipeline = PIPELINES.get(str(model_index.get("_class_name")))
    if pipeline is None:
        raise CheckpointError(
            f"model_index.json is for {brief(model_index.get('_class_name'))}, expected {' or '.join(PIPELINES)}; "
            "name a checkpoint of Qwen-Image-Edit"
        )
    own = _own(model_index)
    vision = VisionConfig.from_config(text_encoder)
    image_token_id: Any = text_encoder.get("image_token_id")
    if not _is_count(image_token_id, 0, 1 << 31):
        raise CheckpointError(
            f"text_encoder/config.json: image_token_id = {brief(image_token_id)}, expected a whole number; restore the "
            "checkpoint's config"
        )
    return Model(
        pipeline=pipeline,
        transformer=TransformerConfig.from_config(transformer),
        vision=vision,
        language=LanguageConfig.from_config(text_encoder),
        vae=VaeConfig.from_config(vae),
        processor=parse_processor(text_encoder["vision_config"], preprocessor),
        scheduler=parse_scheduler(scheduler),
        areas=Areas(
            vae_area=own.get("vae_area", VAE_AREA),
            condition_area=None if pipeline == "edit" else own.get("condition_area", CONDITION_AREA),
        ),
        image_token_id=image_token_id,
        schedule=Schedule(**own["schedule"]) if "schedule" in own else None,
        about=own.get("about"),
    )


def _own(model_index: Mapping[str, Any]) -> dict[str, Any]:
    """What a model that is not one of the published ones says of itself, under "_qie" in model_index.json."""
    own = model_index.get("_qie", {})
    areas = {"vae_area", "condition_area"}
    if (
        not isinstance(own, dict)
        or not own.keys() <= areas | {"schedule", "about"}
        or not _is_text(own.get("about", ""))
        or not all(_is_count(own[key], 32 * 32, AREA_MAX) for key in areas & own.keys())
    ):
        raise CheckpointError(
            f"model_index.json: _qie = {brief(own)}, expected vae_area and condition_area from 1024 to {AREA_MAX} "
            f"pixels, schedule, and about of at most {ABOUT_MAX} characters; correct or remove _qie"
        )
    schedule = own.get("schedule")
    if schedule is not None and not (
        isinstance(schedule, dict)
        and schedule.keys() == {"steps", "guidance"}
        and _is_count(schedule["steps"], 1, 1000)
        and isinstance(schedule["guidance"], int | float)
        and not isinstance(schedule["guidance"], bool)
        and 1 <= schedule["guidance"] <= 100
    ):
        raise CheckpointError(
            f"model_index.json: _qie.schedule = {brief(schedule)}, expected 1 to 1000 steps and guidance from 1 to "
            "100; correct or remove the schedule"
        )
    return {key: value for key, value in own.items() if value is not None}


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_text(value: Any) -> bool:
    """Whether a value is text of a reasonable length that a file in UTF-8 can hold."""
    return isinstance(value, str) and len(value) <= ABOUT_MAX and not any("\ud800" <= c <= "\udfff" for c in value)
