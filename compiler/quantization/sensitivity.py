"""Sensitivity: ranks linears by the error that quantizing each of them alone causes, and chooses those to exclude.

The error is the relative L2, over all samples together, of the transformer's velocity or of the language model's prompt
embeddings. Errors of different linears are nearly independent, so their squares add up. The choice uses that estimate;
the chosen set is then measured as a whole.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.metrics.error import pooled_relative_l2
from qie.compiler.quantization.block_weights import Readers
from qie.compiler.quantization.blockwise import Segment, Values, loaded, read_later, run, segments
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import linears
from qie.compiler.quantization.qdq import Quantized, quantize_linears
from qie.compiler.quantization.smoothing import smoothed_modulation, smoothed_reader
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.manifest import Component
from qie.engines.progress import Progress, no_progress
from qie.engines.terminal import human_bytes, table

__all__ = ["RESULTS", "Sensitivity", "choose", "describe", "sensitivity"]

RESULTS: dict[Component, str] = {"transformer": "velocity", "language": "prompt_embeds"}
"""The output whose error is measured, for each component."""

CARRIED_BYTES = 4 * 2**30
"""Bytes of values that one walk along the blocks may carry; the values of one more linear may exceed it."""

TRIES = 8
"""Attempts to exclude more linears where the measured error exceeds the budget and the estimate does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """The ranking of one component's linears for one scheme.

    Attributes:
        component: the component.
        scheme: the scheme.
        errors: linear -> relative L2 of the result when it alone is quantized.
        bytes: linear -> bytes of its weight in bfloat16.
        all_quantized_error: relative L2 with all linears quantized.
        budget: relative L2 that quantization may cause.
        exclude: linears to exclude for that budget, most important first.
        error_after_exclusion: relative L2 measured with these excluded.
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
        """The ranking as JSON, errors sorted from the largest."""
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
    progress: Progress = no_progress,
) -> Sensitivity:
    """Rank the linears of ``component`` over ``values`` (``component_values``), and choose those to exclude."""
    graph = GRAPHS[component](checkpoint.model, "bfloat16")
    names = linears(graph)
    stored = {weight.name: 2 * math.prod(weight.shape) for weight in graph.weights}
    sizes = {name: stored[f"{name}.weight"] for name in names}
    exact, errors = _errors_alone(checkpoint, readers, values, component, scheme, calibration, progress)

    def error(quantized: Sequence[str]) -> float:
        variant = _variant(checkpoint, readers, component, scheme, quantized, calibration)
        samples = [variant.inputs(sample) for sample in values]
        run(variant.quantized.graph, variant.readers, samples, no_progress)
        return pooled_relative_l2([sample[RESULTS[component]] for sample in samples], exact)

    all_quantized_error = error(names)
    exclude: tuple[str, ...] = ()
    measured, estimate_limit = all_quantized_error, budget
    for _ in range(TRIES):
        if measured <= budget:
            break
        exclude = choose(errors, sizes, estimate_limit)
        measured = error([name for name in names if name not in exclude]) if len(exclude) < len(names) else 0.0
        estimate_limit *= budget / measured if measured > budget else 1
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


def describe(ranking: Sensitivity) -> str:
    """The text of ``ranking``: a table of the worst linears, and the error with and without exclusions."""
    worst = sorted(ranking.errors, key=lambda name: ranking.errors[name], reverse=True)[:12]
    rows = [[name, f"{ranking.errors[name]:.4f}", "excluded" if name in ranking.exclude else ""] for name in worst]
    excluded = human_bytes(sum(ranking.bytes[name] for name in ranking.exclude))
    return "\n".join(
        [
            "",
            table(rows, header=["quantized alone", "error", ""], right=[1]),
            "",
            f"{ranking.component}, {ranking.scheme}: the error is {ranking.all_quantized_error:.4f} with all "
            f"{len(ranking.errors)} linears quantized, and {ranking.error_after_exclusion:.4f} with "
            f"{len(ranking.exclude)} of them excluded ({excluded}); the budget is {ranking.budget:g}",
        ]
    )


def choose(errors: dict[str, float], sizes: dict[str, int], budget: float) -> tuple[str, ...]:
    """The linears to exclude so that the estimated error of the others is at most ``budget``.

    Those with the largest squared error per byte come first.
    """
    remaining = sum(error**2 for error in errors.values())
    exclude = []
    for name in sorted(errors, key=lambda name: errors[name] ** 2 / sizes[name], reverse=True):
        if remaining <= budget**2:
            break
        exclude.append(name)
        remaining -= errors[name] ** 2
    return tuple(exclude)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    """A component in float32 with some of its linears quantized, and the readers of its weights."""

    quantized: Quantized
    readers: Readers

    def inputs(self, sample: Values) -> Values:
        """``sample`` with the modulation that the smoothed graph reads."""
        if "modulation" not in sample:
            return dict(sample)
        smoothed = smoothed_modulation(sample["modulation"], self.quantized.groups, self.quantized.smoothing_scales)
        return sample | {"modulation": smoothed}


def _variant(
    checkpoint: Checkpoint,
    readers: Readers,
    component: Component,
    scheme: SchemeName,
    names: Sequence[str],
    calibration: Calibration,
) -> _Variant:
    model = checkpoint.model
    quantized = quantize_linears(GRAPHS[component](model, "float32"), scheme, names, calibration, model.language)
    subfolder = quantized.graph.subfolder
    reader = smoothed_reader(readers[subfolder], quantized.groups, quantized.smoothing_scales)
    return _Variant(quantized=quantized, readers={**readers, subfolder: reader})


def _errors_alone(
    checkpoint: Checkpoint,
    readers: Readers,
    values: Sequence[Values],
    component: Component,
    scheme: SchemeName,
    calibration: Calibration,
    progress: Progress,
) -> tuple[list[NDArray[Any]], dict[str, float]]:
    """The exact results of ``values``, and the error of each linear alone."""
    graph = GRAPHS[component](checkpoint.model, "float32")
    cut, names = segments(graph), linears(graph)
    same_in_all_blocks: dict[str, list[str]] = {}
    for name in names:
        same_in_all_blocks.setdefault(re.sub(r"\.\d+\.", ".", name, count=1), []).append(name)
    variants: dict[str, tuple[_Variant, tuple[Segment, ...]]] = {}
    for group in same_in_all_blocks.values():
        variant = _variant(checkpoint, readers, component, scheme, group, calibration)
        variants |= dict.fromkeys(group, (variant, segments(variant.quantized.graph)))
    owners = {w.name.removesuffix(".weight"): number for number, segment in enumerate(cut) for w in segment.weights}
    done, total = 0, sum(len(cut) - owners[name] for name in names)
    errors: dict[str, float] = {}
    position, samples = 0, [dict(sample) for sample in values]
    while True:
        pending = {name: owners[name] for name in names if name not in errors}
        walk = _Walk(cut, readers, samples, position, pending, variants)
        while walk.position < len(cut):
            walk.advance()
            done += len(walk.carried)
            progress("sensitivity", done, total)
        exact = [sample[RESULTS[component]] for sample in walk.exact]
        for name, carried in walk.carried.items():
            errors[name] = pooled_relative_l2([sample[RESULTS[component]] for sample in carried], exact)
        if walk.resume is None:
            return exact, {name: errors[name] for name in names}
        position, samples = walk.resume


class _Walk:
    """One walk along the segments of a component, which measures as many linears as fit into CARRIED_BYTES.

    Nothing in front of a segment depends on a linear in it, and behind it the segments are the exact ones again. So the
    walk carries the values of all samples once with nothing quantized (``exact``), and once more for each linear whose
    segment lies behind (``carried``). The weights of a segment are read once for all of them.

    Attributes:
        position: the segment that ``advance`` runs next.
        exact: the samples' values in front of it.
        carried: linear -> the samples' values in front of it with that linear quantized.
        resume: position and exact values from which the next walk starts, because linears found no room in this one.
    """

    def __init__(
        self,
        cut: Sequence[Segment],
        readers: Readers,
        samples: list[Values],
        position: int,
        pending: Mapping[str, int],
        variants: Mapping[str, tuple[_Variant, Sequence[Segment]]],
    ) -> None:
        """Start at ``position``; ``pending`` maps the linears to measure to their segments."""
        self.position = position
        self.exact = samples
        self.carried: dict[str, list[Values]] = {}
        self.resume: tuple[int, list[Values]] | None = None
        self._cut, self._readers, self._pending, self._variants = cut, readers, pending, variants

    def advance(self) -> None:
        """Run the next segment for everything that is carried, then start the linears in it."""
        segment, later = self._cut[self.position], read_later(self._cut, self.position)
        before = self.exact
        with loaded(segment, self._readers) as compute:
            self.exact = [_only(sample | compute(sample), later) for sample in before]
            self.carried = {
                name: [_only(sample | compute(sample), later) for sample in samples]
                for name, samples in self.carried.items()
            }
        if self.resume is None:
            self._start_linears(before, later)
        self.position += 1

    def _start_linears(self, before: list[Values], later: frozenset[str]) -> None:
        """Run the segment with each of its linears quantized alone, until CARRIED_BYTES are full."""
        for name in [name for name, owner in self._pending.items() if owner == self.position]:
            if _size(self.carried, self._cut[self.position].makes) > CARRIED_BYTES:
                self.resume = self.position, before
                return
            variant, variant_cut = self._variants[name]
            with loaded(variant_cut[self.position], variant.readers) as compute:
                self.carried[name] = [_only(sample | compute(variant.inputs(sample)), later) for sample in before]


def _only(values: Values, names: frozenset[str]) -> Values:
    return {name: value for name, value in values.items() if name in names}


def _size(carried: Mapping[str, Sequence[Values]], names: Sequence[str]) -> int:
    """Bytes of the values ``names``."""
    return sum(s[name].nbytes for samples in carried.values() for s in samples for name in names if name in s)
