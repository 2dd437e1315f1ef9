"""The edit that an estimate is made for, and the sizes that it gives the inputs of every component."""

from dataclasses import dataclass

from qie.compiler.checkpoint.model import areas, schedules
from qie.compiler.checkpoint.processor import vision_spec
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.profiles import INSTRUCTION_TOKENS
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.specs import SIDE_MULTIPLE, Size, VisionSpec
from qie.engines.errors import EditError
from qie.engines.inputs.image import output_size
from qie.engines.inputs.prompt import PREFIX_TOKENS
from qie.engines.inputs.sizes import calculate_dimensions, resolve_size
from qie.engines.inputs.vision import smart_resize

__all__ = ["Workload", "largest_sizes", "sizes_of", "workload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One edit: an image of ``size`` from ``references`` images of the same aspect ratio. ``notes`` are for people."""

    size: Size
    references: int
    steps: int
    guidance: float
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """Passes a step: guidance takes a second one."""
        return 2 if self.guidance > 1 else 1


def workload(
    plan: Plan,
    *,
    size: tuple[int, int] | None = None,
    references: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
) -> Workload:
    """The edit of these settings. What is None is a square of the model's area, or the recipe's first schedule.

    Raises:
        EditError: a side is not positive, or the plan's engines take fewer images.
    """
    area, first = areas(plan.checkpoint).vae_area, schedules(plan.checkpoint, plan.recipe)[0]
    if not 1 <= references <= _most_references(plan):
        raise EditError(f"{references} references were asked for, this plan takes 1 to {_most_references(plan)}")
    square = calculate_dimensions(area, 1)
    used, note = resolve_size(plan.recipe.shape_limits(area), *(size or (square.width, square.height)))
    return Workload(
        size=used,
        references=references,
        steps=first.steps if steps is None else steps,
        guidance=first.guidance if guidance is None else guidance,
        notes=(note,) if note else (),
    )


def sizes_of(plan: Plan, work: Workload) -> dict[Component, dict[str, int]]:
    """The free dims of every component's inputs in an edit."""
    width, height = output_size((work.size.width, work.size.height), areas(plan.checkpoint).vae_area)
    reference = Size(width=width, height=height)
    patches = work.references * _patches(plan, reference)
    text_tokens = patches // _vision(plan).merge_size ** 2 + INSTRUCTION_TOKENS
    return _dims(plan, 1, work.size, reference, work.references, patches, text_tokens)


def largest_sizes(plan: Plan) -> dict[Component, dict[str, int]]:
    """The free dims of every component's inputs in the largest edit that the recipe allows."""
    limits, references = plan.recipe.shape_limits(areas(plan.checkpoint).vae_area), _most_references(plan)
    image = calculate_dimensions(limits.max_area, 1)
    reference = max(limits.buckets, key=lambda bucket: bucket.area)
    patches = references * max(_patches(plan, bucket) for bucket in limits.buckets)
    return _dims(plan, limits.batch_max, image, reference, references, patches, limits.prompt_tokens_max)


def _dims(
    plan: Plan, batch: int, image: Size, reference: Size, references: int, patches: int, text_tokens: int
) -> dict[Component, dict[str, int]]:
    """``patches`` are those of all references; only the transformer sees a batch (``qie.engines.editing.editor``)."""
    image_tokens = patches // _vision(plan).merge_size ** 2
    noise_tokens, reference_tokens = image.tokens, reference.tokens
    return {
        "vision": {"patches": patches, "image_tokens": image_tokens},
        "language": {"batch": 1, "prompt_tokens": PREFIX_TOKENS + text_tokens, "image_tokens": image_tokens},
        "vae_encoder": {"batch": 1, "height": reference.height, "width": reference.width},
        "transformer": {
            "batch": batch,
            "noise_tokens": noise_tokens,
            "reference_tokens": references * reference_tokens,
            "text_tokens": text_tokens,
            "tokens": text_tokens + noise_tokens + references * reference_tokens,
        },
        "vae_decoder": {
            "batch": 1,
            "rows": image.height // SIDE_MULTIPLE,
            "columns": image.width // SIDE_MULTIPLE,
        },
    }


def _most_references(plan: Plan) -> int:
    return 1 if plan.checkpoint.pipeline == "edit" else plan.recipe.shapes.references.max


def _patches(plan: Plan, reference: Size) -> int:
    """Patches that the vision tower makes of one image of the aspect ratio of ``reference``."""
    model, spec = areas(plan.checkpoint), _vision(plan)
    width, height = output_size((reference.width, reference.height), model.condition_area or model.vae_area)
    rows, columns = smart_resize(
        height,
        width,
        factor=spec.patch_size * spec.merge_size,
        min_pixels=spec.min_pixels,
        max_pixels=spec.max_pixels,
    )
    return rows * columns // spec.patch_size**2


def _vision(plan: Plan) -> VisionSpec:
    return vision_spec(plan.checkpoint.text_encoder["vision_config"], plan.checkpoint.preprocessor)
