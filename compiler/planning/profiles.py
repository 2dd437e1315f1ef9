"""The shapes that an engine is built for: smallest, tuned-for and largest size of every free dim.

They follow from the recipe's shapes and the model's image areas, so that every edit within the recipe's limits gives
inputs (``qie.engines.inputs.feeds``) within the engine's. Sides are in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.graph import Graph
from qie.compiler.recipe.schema import Range, Recipe
from qie.engines.bundle.manifest import Component, ProfileRecord
from qie.engines.bundle.specs import SIDE_MULTIPLE, ShapeLimits, Size, VisionSpec
from qie.engines.inputs.prompt import PREFIX_TOKENS
from qie.engines.inputs.sizes import BUCKET_MULTIPLE, calculate_dimensions
from qie.engines.inputs.vision import smart_resize

__all__ = ["INSTRUCTION_TOKENS", "largest_dims", "patch_count", "profiles"]

INSTRUCTION_TOKENS = 60
"""Text tokens of the instruction in the edit that engines are tuned for."""


def profiles(graph: Graph, recipe: Recipe, model: Model) -> tuple[ProfileRecord, ...]:
    """The profile of every input of ``graph`` that has a free dim, in the order of the inputs."""
    spans = _spans(graph.component, recipe, model)

    def shape(dims: Sequence[int | str], end: Callable[[Range], int]) -> tuple[int, ...]:
        return tuple(end(spans[d]) if isinstance(d, str) else d for d in dims)

    return tuple(
        ProfileRecord(
            input=spec.name,
            min=shape(spec.dims, lambda span: span.min),
            opt=shape(spec.dims, lambda span: span.opt),
            max=shape(spec.dims, lambda span: span.max),
        )
        for spec in graph.inputs
        if any(isinstance(d, str) for d in spec.dims)
    )


def largest_dims(component: Component, recipe: Recipe, model: Model) -> dict[str, int]:
    """The largest size of every free dim in the profiles of ``component``; no edit has all of them at once."""
    return {dim: span.max for dim, span in _spans(component, recipe, model).items()}


def _spans(component: Component, recipe: Recipe, model: Model) -> dict[str, Range]:
    """The range of every free dim of a component's graph; dims that depend on several images grow with their number."""
    shapes, areas, limits = recipe.shapes, model.areas, model.limits(recipe)
    references = _each(shapes.references, lambda count: min(count, model.references_max))
    condition = _sizes(areas.condition_area or areas.vae_area, limits, areas.vae_area)
    encoded = _sizes(areas.vae_area, limits, areas.vae_area)

    patches = _several(references, [patch_count(size, model.processor) for size in condition])
    image_tokens = _each(patches, lambda count: count // model.processor.merge_size**2)
    prompt = shapes.prompt_tokens
    text_tokens = replace(prompt, opt=min(max(prompt.opt, image_tokens.opt + INSTRUCTION_TOKENS), prompt.max))
    tuned = limits.buckets[0]
    noise_tokens = Range(
        min=(limits.min_side // SIDE_MULTIPLE) ** 2, opt=tuned.tokens, max=limits.max_area // SIDE_MULTIPLE**2
    )
    reference_tokens = _several(references, [size.tokens for size in encoded])
    default, steps_max = model.schedules(recipe)[0].steps, model.scheduler.num_train_timesteps
    steps = Range(min=1, opt=default, max=steps_max)
    height = Range(min=limits.min_side, opt=tuned.height, max=limits.max_side)
    width = Range(min=limits.min_side, opt=tuned.width, max=limits.max_side)
    return {
        "batch": shapes.batch if component == "transformer" else Range(min=1, opt=1, max=1),  # others go one by one
        "patches": patches,
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "prompt_tokens": _each(text_tokens, lambda count: count + PREFIX_TOKENS),
        "steps": steps,
        "steps_of_blocks": _each(steps, lambda count: count * model.transformer.layers),
        "noise_tokens": noise_tokens,
        "reference_tokens": reference_tokens,
        "latent_tokens": _sum(noise_tokens, reference_tokens),
        "tokens": _sum(text_tokens, noise_tokens, reference_tokens),
        "height": height,
        "width": width,
        "rows": _each(height, lambda side: side // SIDE_MULTIPLE),
        "columns": _each(width, lambda side: side // SIDE_MULTIPLE),
    }


def _sizes(area: int, limits: ShapeLimits, model_area: int) -> list[Size]:
    """The sizes at ``area`` to which ``calculate_dimensions`` resizes the images that the engines take, a square first.

    Those images have any aspect ratio at which neither side exceeds ``limits.max_side`` at the model's own area. A size
    just beyond that may be included.
    """
    longest = round((limits.max_side + BUCKET_MULTIPLE / 2) * math.sqrt(area / model_area) / BUCKET_MULTIPLE)
    sizes = [calculate_dimensions(area, 1)]
    for columns in range(1, longest + 1):
        rows_min, rows_max = (area / (columns + half) / BUCKET_MULTIPLE**2 for half in (0.5, -0.5))
        for rows in range(max(round(rows_min), 1), min(round(rows_max), longest) + 1):
            sizes.append(Size(width=columns * BUCKET_MULTIPLE, height=rows * BUCKET_MULTIPLE))
    return sizes


def patch_count(size: Size, processor: VisionSpec) -> int:
    """Patches into which the image processor cuts an image of ``size``."""
    height, width = smart_resize(
        size.height,
        size.width,
        factor=processor.patch_size * processor.merge_size,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
    )
    return height * width // processor.patch_size**2


def _several(number: Range, counts: Sequence[int]) -> Range:
    """The total over ``number`` images with one of ``counts`` each, the first of which is the usual one."""
    return Range(min=number.min * min(counts), opt=number.opt * counts[0], max=number.max * max(counts))


def _each(span: Range, change: Callable[[int], int]) -> Range:
    return Range(min=change(span.min), opt=change(span.opt), max=change(span.max))


def _sum(*spans: Range) -> Range:
    return Range(min=sum(s.min for s in spans), opt=sum(s.opt for s in spans), max=sum(s.max for s in spans))
