"""Rules between the keys of a recipe: values that are right by themselves and contradict each other."""

from collections.abc import Iterator
from pathlib import Path

from qie.compiler.recipe.quantizable import QUANTIZABLE
from qie.compiler.recipe.schema import (
    DIVISIBLE,
    FP8_CAPABILITY,
    REFERENCES_MAX,
    Range,
    Recipe,
    supports_fp8,
    supports_fp8_attention,
)
from qie.compiler.recipe.toml import inline
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import RecipeError

__all__ = ["check_rules"]


def check_rules(recipe: Recipe, file: Path) -> None:
    """Check the keys of a recipe against each other.

    Raises:
        RecipeError: two keys contradict each other.
    """
    for key, problem in _contradictions(recipe):
        raise RecipeError(f"{key} in {file} {problem}")


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every contradiction, as a key and the rest of the sentence."""
    yield from _of_components(recipe)
    yield from _of_target(recipe)
    yield from _of_shapes(recipe)
    yield from _of_schedules(recipe)


def _of_components(recipe: Recipe) -> Iterator[tuple[str, str]]:
    capability = recipe.compute_capability
    gpu = f"{recipe.gpu} ({capability or 'no compute_capability, so a CPU'})"
    no_fp8 = f'is "fp8", which needs compute capability {FP8_CAPABILITY} or later, not {gpu}'
    for name in COMPONENTS:
        section, key = recipe.components[name], f"components.{name}"
        if name == "transformer" and section.precision == "float16":
            yield f"{key}.precision", 'is "float16", which overflows and gives black images; use "bfloat16"'
        if capability is None and section.precision == "bfloat16":
            yield f"{key}.precision", 'is "bfloat16", for which onnxruntime has no kernels on a CPU; use "float32"'
        if name not in QUANTIZABLE and section.scheme != "none":
            yield f"{key}.scheme", f'is "{section.scheme}", but {name} cannot be quantized; use "none"'
        if name not in QUANTIZABLE and section.attention != "none":
            yield f"{key}.attention", f'is "{section.attention}", but {name} cannot be quantized; use "none"'
        if name not in DIVISIBLE and section.parts is not None:
            yield f"{key}.parts", f"is {section.parts}, but {name} cannot be divided; leave it out"
        if section.attention == "fp8" and capability is not None and not supports_fp8(capability):
            yield f"{key}.attention", f'{no_fp8}; use "none"'
        elif section.attention == "fp8" and capability is not None:
            slow = [backend for backend in recipe.backends_of(name) if not supports_fp8_attention(backend, capability)]
            if slow:
                problem = f"whose attention kernels for {gpu} do not compute in FP8"
                yield f"{key}.attention", f'is "fp8", and backends has {slow[0]}, {problem}; use "none"'
        if section.scheme == "fp8" and capability is not None and not supports_fp8(capability):
            yield f"{key}.scheme", f'{no_fp8}; use "int8-smooth" or "none"'
        if section.backend is not None and (misfit := recipe.misfit(section.backend, name)) is not None:
            yield f"{key}.backend", f'is "{section.backend}", which {misfit}; name another backend or none'
        able = [backend for backend in recipe.backends if name in BACKENDS[backend].components]
        if not able:
            known = ", ".join(backend for backend, row in BACKENDS.items() if name in row.components)
            yield "backends", f"lists no backend that runs {name}; add one of {known}"
        elif all(BACKENDS[backend].source != "graph" for backend in able) and (section.parts or 1) > 1:
            yield f"{key}.parts", f"is {section.parts}, but {' and '.join(able)} is built whole; leave it out"
        elif not recipe.backends_of(name):
            which = "scheme" if section.scheme != "none" else "attention"
            yield (
                f"{key}.{which}",
                f'is "{getattr(section, which)}" in bfloat16, for which {" and ".join(able)} has no kernels on a GPU; '
                'use "none" or precision "float32", or add another backend',
            )


def _of_target(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for backend in recipe.backends:
        if recipe.compute_capability is None and not BACKENDS[backend].on_cpu:
            yield "backends", f"has {backend}, which needs a GPU; set compute_capability or use onnxruntime"
    for name in COMPONENTS:
        own = recipe.components[name].backend
        if own is not None and recipe.compute_capability is None and not BACKENDS[own].on_cpu:
            yield f"components.{name}.backend", f'is "{own}", which needs a GPU; set compute_capability or use another'
    if recipe.specialization != "none" and "tensorrt-rtx" not in recipe.backends:
        yield "specialization", f'is "{recipe.specialization}", for which backends needs tensorrt-rtx; use "none"'
    if recipe.limits.build_workspace_gib > recipe.memory_gib:
        yield "limits.build_workspace_gib", f"is more than memory_gib ({recipe.memory_gib:g}); lower it"


def _of_shapes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    shapes = recipe.shapes
    for dimension in ("batch", "references", "prompt_tokens"):
        span: Range = getattr(shapes, dimension)
        if not span.min <= span.opt <= span.max:
            yield f"shapes.{dimension}", f"is {inline(span)}; choose values with min <= opt <= max"
    if shapes.references.max > REFERENCES_MAX:
        yield "shapes.references.max", f"is {shapes.references.max}, expected at most {REFERENCES_MAX}; lower it"
    if not shapes.aspect_ratios:
        yield "shapes.aspect_ratios", 'is empty; add at least one, like "1:1"'


def _of_schedules(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if not recipe.schedules:
        yield "schedules", "is empty; add at least one, the first of which is the default of an edit"
    for index, schedule in enumerate(recipe.schedules):
        ratios = recipe.shapes.aspect_ratios
        missing = [] if schedule.sizes == "all" else [size for size in schedule.sizes if size not in ratios]
        if missing or not schedule.sizes:
            problem = f"has {', '.join(missing)}, not in shapes.aspect_ratios" if missing else "is empty"
            yield f"schedules[{index}].sizes", f'{problem}; name some of those or "all"'
