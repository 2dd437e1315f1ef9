"""The edit that an estimate is made for, and the sizes that it gives the inputs of every component."""

from dataclasses import dataclass

from qie.compiler.checkpoint.model import Model
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.profiles import INSTRUCTION_TOKENS, patch_count
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.specs import SIDE_MULTIPLE, Size
from qie.engines.editing.settings import GUIDANCE_MAX
from qie.engines.errors import RequestError
from qie.engines.inputs.prepare import output_size
from qie.engines.inputs.prompt import PREFIX_TOKENS
from qie.engines.inputs.sizes import calculate_dimensions, resolve_size

__all__ = ["Workload", "largest_sizes", "sizes_of", "workload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One edit.

    Attributes:
        size: of the result.
        references: number of input images, each of the same aspect ratio as the result.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        notes: differences from what was asked for, for a person to read.
    """

    size: Size
    references: int
    steps: int
    guidance: float
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """Transformer runs per step: two with guidance."""
        return 2 if self.guidance > 1 else 1


def workload(
    plan: Plan,
    *,
    size: tuple[int, int] | None = None,
    references: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
) -> Workload:
    """An edit with these settings; by default a square of the model's area, and the recipe's first schedule.

    Raises:
        RequestError: a side is not positive, the plan's engines take fewer images, or steps or guidance cannot be used.
    """
    model, limits = plan.model, plan.model.limits(plan.recipe)
    first = model.schedules(plan.recipe)[0]
    if not 1 <= references <= limits.references_max:
        raise RequestError(
            f"{references} input images were requested, this plan takes 1 to {limits.references_max}; use fewer",
            option="references",
        )
    steps_max = model.scheduler.num_train_timesteps
    if steps is not None and not 1 <= steps <= steps_max:
        raise RequestError(f"{steps} steps were requested, expected 1 to {steps_max}; use fewer", option="steps")
    if guidance is not None and not abs(guidance) <= GUIDANCE_MAX:
        raise RequestError(
            f"the guidance scale is {guidance}, expected a finite number; use one such as 4.0", option="guidance"
        )
    square = calculate_dimensions(model.areas.vae_area, 1)
    used, note = resolve_size(limits, *(size or (square.width, square.height)))
    return Workload(
        size=used,
        references=references,
        steps=first.steps if steps is None else steps,
        guidance=first.guidance if guidance is None else guidance,
        notes=(note,) if note else (),
    )


def sizes_of(plan: Plan, work: Workload) -> dict[Component, dict[str, int]]:
    """The free dims of every component's inputs in an edit."""
    width, height = output_size((work.size.width, work.size.height), plan.model.areas.vae_area)
    reference = Size(width=width, height=height)
    patches = work.references * _patches(plan.model, reference)
    text_tokens = patches // plan.model.processor.merge_size**2 + INSTRUCTION_TOKENS
    return _dims(plan, 1, work.steps, work.size, reference, work.references, patches, text_tokens)


def largest_sizes(plan: Plan, steps: int) -> dict[Component, dict[str, int]]:
    """The free dims of every component's inputs in the largest edit of ``steps`` that the recipe allows."""
    limits = plan.model.limits(plan.recipe)
    image = calculate_dimensions(limits.max_area, 1)
    reference = max(limits.buckets, key=lambda bucket: bucket.area)
    patches = limits.references_max * max(_patches(plan.model, bucket) for bucket in limits.buckets)
    return _dims(
        plan, limits.batch_max, steps, image, reference, limits.references_max, patches, limits.prompt_tokens_max
    )


def _dims(
    plan: Plan, batch: int, steps: int, image: Size, reference: Size, references: int, patches: int, text_tokens: int
) -> dict[Component, dict[str, int]]:
    """Free dims with the ``patches`` of all references; only the transformer runs a batch."""
    image_tokens = patches // plan.model.processor.merge_size**2
    noise_tokens, reference_tokens = image.tokens, reference.tokens
    return {
        "vision": {"patches": patches, "image_tokens": image_tokens},
        "language": {
            "batch": 1,
            "prompt_tokens": PREFIX_TOKENS + text_tokens,
            "text_tokens": text_tokens,
            "image_tokens": image_tokens,
        },
        "vae_encoder": {"batch": 1, "height": reference.height, "width": reference.width},
        "transformer": {
            "batch": batch,
            "steps": steps,
            "steps_of_blocks": steps * plan.model.transformer.layers,
            "noise_tokens": noise_tokens,
            "reference_tokens": references * reference_tokens,
            "latent_tokens": noise_tokens + references * reference_tokens,
            "text_tokens": text_tokens,
            "tokens": text_tokens + noise_tokens + references * reference_tokens,
        },
        "vae_decoder": {
            "batch": 1,
            "rows": image.height // SIDE_MULTIPLE,
            "columns": image.width // SIDE_MULTIPLE,
        },
    }


def _patches(model: Model, image: Size) -> int:
    """Patches of one image with the aspect ratio of ``image`` in the vision tower."""
    areas = model.areas
    width, height = output_size((image.width, image.height), areas.condition_area or areas.vae_area)
    return patch_count(Size(width=width, height=height), model.processor)
