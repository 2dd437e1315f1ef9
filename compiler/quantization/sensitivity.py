"""Ranks linears by what quantizing each of them alone does to the result, and chooses which to keep.

The result of the transformer is the velocity, that of the language model the prompt embeddings; errors are relative L2
over all samples. Errors of different linears are nearly independent, so their squares add up: that is the estimate by
which linears are chosen, and what is chosen is then measured together.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.quantization.blockwise import Segment, Values, loaded, read_later, segments
from qie.compiler.quantization.calibrate import calibrate
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.qdq import Quantized, apply, linears
from qie.compiler.quantization.samples import Progress, Readers, Sample, run, values_of
from qie.compiler.quantization.smoothing import smoothed_modulation, smoothed_reader
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.manifest import Component
from qie.engines.files import qie_home

__all__ = ["Sensitivity", "choose", "errors_of", "measure", "sensitivity"]

RESULTS: dict[Component, str] = {"transformer": "velocity", "language": "prompt_embeds"}

CARRIED_BYTES = 4 * 2**30
"""Of samples' values that one walk along the blocks carries at most, give or take a block's."""

TRIES = 8
"""How often more is kept when the measured error is above the budget though the estimate was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """``errors``: linear -> relative L2 of the result when it alone is quantized; ``bytes``: what keeping it costs.

    ``all_quantized_error`` is the error with all linears quantized; ``exclude`` lists the linears to exclude for
    ``budget``, most important first, and ``error_after_exclusion`` is the error measured with them excluded.
    """

    component: Component
    scheme: SchemeName
    errors: dict[str, float]
    bytes: dict[str, int]
    all_quantized_error: float
    budget: float
    exclude: tuple[str, ...]
    error_after_exclusion: float

    def facts(self) -> dict[str, Any]:
        """Everything as JSON; errors are in order, most first."""
        return {
            "component": self.component,
            "scheme": self.scheme,
            "budget": self.budget,
            "all_quantized_error": self.all_quantized_error,
            "exclude": list(self.exclude),
            "error_after_exclusion": self.error_after_exclusion,
            "excluded_bytes": sum(self.bytes[name] for name in self.exclude),
            "errors": dict(sorted(self.errors.items(), key=lambda item: item[1], reverse=True)),
        }


def sensitivity(
    checkpoint: Checkpoint,
    readers: Readers,
    values: Sequence[Values],
    calibration: Calibration,
    *,
    component: Component,
    scheme: SchemeName,
    budget: float,
    progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """Rank the linears of ``component`` over ``values`` and choose those to exclude for ``budget``."""
    graph = GRAPHS[component](checkpoint.model, "bfloat16")
    names = linears(graph)
    stored = {weight.name: 2 * math.prod(weight.shape) for weight in graph.weights}
    sizes = {name: stored[f"{name}.weight"] for name in names}
    exact, errors = _alone(checkpoint, readers, values, component, scheme, calibration, progress)

    def error(chosen: Sequence[str]) -> float:
        variant = _variant(checkpoint, readers, component, scheme, chosen, calibration)
        samples = [variant.read(sample) for sample in values]
        run(variant.made.graph, variant.readers, samples, lambda what, done, total: None)
        return errors_of([sample[RESULTS[component]] for sample in samples], exact)

    all_quantized_error = error(names)
    exclude: tuple[str, ...] = ()
    measured, aim = all_quantized_error, budget
    for _ in range(TRIES):
        if measured <= budget:
            break
        exclude = choose(errors, sizes, aim)
        measured = error([name for name in names if name not in exclude]) if len(exclude) < len(names) else 0.0
        aim *= budget / measured if measured > budget else 1
    return Sensitivity(
        component=component,
        scheme=scheme,
        errors=errors,
        bytes=sizes,
        all_quantized_error=all_quantized_error,
        budget=budget,
        exclude=exclude,
        error_after_exclusion=measured,
    )


def measure(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    *,
    component: Component = "transformer",
    schemes: Sequence[SchemeName] = (),
    budget: float = 0.0,
    most: int = 16,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Calibration, list[Sensitivity]]:
    """The calibration of ``checkpoint`` over ``samples``, with a ranking of ``component`` for each of ``schemes`` and
    what to keep for ``budget``; ``most`` of the samples are ranked with.

    Raises:
        CheckpointError: weights are missing or of another shape.
        RequestError: a picture or an instruction is one that the model cannot take.
    """
    parts: tuple[Subfolder, ...] = ("transformer", "text_encoder", "vae")
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
                scheme=scheme,
                budget=budget,
                progress=progress,
            )
        )
    return replace(found, exclude={f"{component}/{r.scheme}": r.exclude for r in rankings}), rankings


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """A component in float32 with some of its linears quantized, and what gives it its weights."""

    made: Quantized
    readers: Readers

    def read(self, sample: Values) -> Values:
        """``sample`` as the graph reads it: with a modulation that divides what is smoothed."""
        if "modulation" not in sample:
            return dict(sample)
        smoothed = smoothed_modulation(sample["modulation"], self.made.groups, self.made.smoothing_scales)
        return sample | {"modulation": smoothed}


def _variant(
    checkpoint: Checkpoint,
    readers: Readers,
    component: Component,
    scheme: SchemeName,
    names: Sequence[str],
    calibration: Calibration,
) -> _Variant:
    language = checkpoint.model.language
    made = apply(GRAPHS[component](checkpoint.model, "float32"), scheme, names, calibration, language)
    part = made.graph.subfolder
    reader = smoothed_reader(readers[part], made.groups, made.smoothing_scales)
    return _Variant(made=made, readers={**readers, part: reader})


def _alone(
    checkpoint: Checkpoint,
    readers: Readers,
    values: Sequence[Values],
    component: Component,
    scheme: SchemeName,
    calibration: Calibration,
    progress: Progress,
) -> tuple[list[NDArray[Any]], dict[str, float]]:
    """The exact results of ``values``, and the error of each linear alone.

    Nothing in front of a block depends on what is quantized in it, and behind it the blocks are the exact ones again.
    So a walk along the blocks carries the values of all samples as they are with nothing quantized, and once more for
    each linear whose block lies behind; every block's weights are read once for all of them. Where the carried values
    fill CARRIED_BYTES, the other linears wait for another walk, from where the first of them is.
    """
    graph = GRAPHS[component](checkpoint.model, "float32")
    pieces, names = segments(graph), linears(graph)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\.\d+\.", ".", name, count=1), []).append(name)
    variants: dict[str, tuple[_Variant, tuple[Segment, ...]]] = {}
    for of_all_blocks in kinds.values():
        variant = _variant(checkpoint, readers, component, scheme, of_all_blocks, calibration)
        variants |= dict.fromkeys(of_all_blocks, (variant, segments(variant.made.graph)))
    owned = {w.name.removesuffix(".weight"): number for number, piece in enumerate(pieces) for w in piece.weights}
    done, total = 0, sum(len(pieces) - owned[name] for name in names)
    errors: dict[str, float] = {}
    start, first = [dict(sample) for sample in values], 0
    while True:
        exact, carried, waiting = start, dict[str, list[Values]](), None
        for number in range(first, len(pieces)):
            later, before = read_later(pieces, number), exact
            with loaded(pieces[number], readers) as compute:
                exact = [_kept(sample | compute(sample), later) for sample in before]
                carried = {n: [_kept(s | compute(s), later) for s in samples] for n, samples in carried.items()}
            own = [name for name in names if owned[name] == number and name not in errors]
            for name in own if waiting is None else []:
                if _size(carried, pieces[number].makes) > CARRIED_BYTES:
                    waiting = number, before
                    break
                variant, cut = variants[name]
                with loaded(cut[number], variant.readers) as compute:
                    carried[name] = [_kept(sample | compute(variant.read(sample)), later) for sample in before]
            done += len(carried)
            progress("sensitivity", done, total)
        results = [sample[RESULTS[component]] for sample in exact]
        for name, samples in carried.items():
            errors[name] = errors_of([sample[RESULTS[component]] for sample in samples], results)
        if waiting is None:
            return results, {name: errors[name] for name in names}
        first, start = waiting


def _kept(values: Values, later: frozenset[str]) -> Values:
    return {name: value for name, value in values.items() if name in later}


def _size(carried: Mapping[str, Sequence[Values]], names: Sequence[str]) -> int:
    """Bytes of the values of those names."""
    return sum(s[name].nbytes for samples in carried.values() for s in samples for name in names if name in s)
