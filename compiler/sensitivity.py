"""Ranks linears by what quantizing each of them alone does to the result, and chooses which to keep.

The result of the transformer is the velocity, that of the language model the prompt embeddings; errors are relative L2
over all samples. Errors of different linears are nearly independent, so their squares add up: that is the estimate by
which linears are chosen, and what is chosen is then measured together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.calibrate import calibrate
from qie.compiler.calibration import Calibration
from qie.compiler.checkpoint import Checkpoint
from qie.compiler.components import GRAPHS
from qie.compiler.configs import LanguageConfig
from qie.compiler.graphs.weight import Part
from qie.compiler.quantize import apply, linears
from qie.compiler.recipe import Quantization
from qie.compiler.samples import Progress, Readers, Sample, run, values_of
from qie.compiler.segments import Values
from qie.compiler.smooth import smoothed_modulation, smoothed_reader
from qie.engines.files import qie_home
from qie.engines.manifest import Component

__all__ = ["Sensitivity", "choose", "errors_of", "measure", "sensitivity"]

RESULTS: dict[Component, str] = {"transformer": "velocity", "language": "prompt_embeds"}

TRIES = 8
"""How often more is kept when the measured error is above the budget though the estimate was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """``errors``: linear -> relative L2 of the result when it alone is quantized; ``bytes``: what keeping it costs.

    ``everything`` is the error with all quantized; ``keep`` is what is kept for ``budget``, in order of importance, and
    ``kept_error`` the error measured then.
    """

    component: Component
    quantization: Quantization
    errors: dict[str, float]
    bytes: dict[str, int]
    everything: float
    budget: float
    keep: tuple[str, ...]
    kept_error: float

    def facts(self) -> dict[str, Any]:
        """Everything as JSON; errors are in order, most first."""
        return {
            "component": self.component,
            "scheme": self.quantization,
            "budget": self.budget,
            "everything": self.everything,
            "keep": list(self.keep),
            "kept_error": self.kept_error,
            "kept_bytes": sum(self.bytes[name] for name in self.keep),
            "errors": dict(sorted(self.errors.items(), key=lambda item: item[1], reverse=True)),
        }


def sensitivity(
    checkpoint: Checkpoint,
    readers: Readers,
    values: Sequence[Values],
    calibration: Calibration,
    *,
    component: Component,
    quantization: Quantization,
    budget: float,
    progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """The ranking of ``component`` over ``values`` (``qie.compiler.samples``) and the keep-list for ``budget``."""
    graph = GRAPHS[component](checkpoint, "bfloat16")
    names = linears(graph)
    stored = {weight.name: 2 * math.prod(weight.shape) for weight in graph.weights}
    sizes = {name: stored[f"{name}.weight"] for name in names}
    exact = _results(checkpoint, readers, values, component)

    def error(chosen: Sequence[str]) -> float:
        found = _results(checkpoint, readers, values, component, quantization, chosen, calibration)
        return errors_of(found, exact)

    errors = {}
    for number, name in enumerate(names):
        progress("sensitivity", number, len(names))
        errors[name] = error([name])
    progress("sensitivity", len(names), len(names))
    everything = error(names)
    keep: tuple[str, ...] = ()
    measured, aim = everything, budget
    for _ in range(TRIES):
        if measured <= budget:
            break
        keep = choose(errors, sizes, aim)
        measured = error([name for name in names if name not in keep]) if len(keep) < len(names) else 0.0
        aim *= budget / measured if measured > budget else 1
    return Sensitivity(
        component=component,
        quantization=quantization,
        errors=errors,
        bytes=sizes,
        everything=everything,
        budget=budget,
        keep=keep,
        kept_error=measured,
    )


def measure(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    component: Component = "transformer",
    schemes: Sequence[Quantization] = (),
    budget: float = 0.0,
    most: int = 16,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Calibration, list[Sensitivity]]:
    """The calibration of ``checkpoint`` over ``samples``, with a ranking of ``component`` for each of ``schemes`` and
    what to keep for ``budget``; ``most`` of the samples are ranked with.

    Raises:
        CheckpointError: weights are missing or of another shape.
        EditError: a picture or an instruction is one that the model cannot take.
    """
    parts: tuple[Part, ...] = ("transformer", "text_encoder", "vae")
    readers: Readers = {part: checkpoint.reader(part) for part in parts}
    digest = checkpoint.digest(
        cache=qie_home() / "digests.json", progress=partial(progress, "digest of the checkpoint")
    )
    found = calibrate(checkpoint, readers, samples, model=digest, progress=progress)
    rankings = []
    values = values_of(component, checkpoint, readers, samples[:most], progress) if schemes else []
    for scheme in schemes:
        rankings.append(
            sensitivity(
                checkpoint,
                readers,
                values,
                found,
                component=component,
                quantization=scheme,
                budget=budget,
                progress=progress,
            )
        )
    return replace(found, keep={f"{component}/{r.quantization}": r.keep for r in rankings}), rankings


def choose(errors: dict[str, float], sizes: dict[str, int], budget: float) -> tuple[str, ...]:
    """The linears to keep so that the others' errors come to no more than ``budget``: most error a byte first."""
    left = sum(error**2 for error in errors.values())
    keep = []
    for name in sorted(errors, key=lambda name: errors[name] ** 2 / sizes[name], reverse=True):
        if left <= budget**2:
            break
        keep.append(name)
        left -= errors[name] ** 2
    return tuple(keep)


def errors_of(found: Sequence[NDArray[Any]], exact: Sequence[NDArray[Any]]) -> float:
    """Relative L2 over all samples together."""
    wrong = sum(float(np.square(a - b).sum()) for a, b in zip(found, exact, strict=True))
    return math.sqrt(wrong / sum(float(np.square(b).sum()) for b in exact))


def _results(
    checkpoint: Checkpoint,
    readers: Readers,
    values: Sequence[Values],
    component: Component,
    quantization: Quantization = "none",
    names: Sequence[str] = (),
    calibration: Calibration | None = None,
) -> list[NDArray[Any]]:
    """The results of every sample, in float32 but for the linears ``names``."""
    graph, through = GRAPHS[component](checkpoint, "float32"), dict(readers)
    samples = [dict(sample) for sample in values]
    if names:
        language = LanguageConfig.from_config(checkpoint.text_encoder)
        made = apply(graph, quantization, names, calibration, language)
        graph, part = made.graph, made.graph.part
        through[part] = smoothed_reader(readers[part], made.groups, made.factors)
        for sample in samples:
            if "modulation" in sample:
                sample["modulation"] = smoothed_modulation(sample["modulation"], made.groups, made.factors)
    run(graph, through, samples, lambda what, done, total: None)
    return [sample[RESULTS[component]] for sample in samples]
