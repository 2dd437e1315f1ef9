"""Statistics of one component: the amax of what its linears read, and the smoothing scales of each block."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.graphs.graph import Graph
from qie.compiler.quantization.block_weights import Readers
from qie.compiler.quantization.blockwise import Preparation, Segment, Values, run
from qie.compiler.quantization.linears import attention_input_names, attention_inputs, linear_inputs, linears
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.quantization.smoothing import Group, smoothing_groups
from qie.compiler.quantization.smoothing_search import Observed, best_smoothing, largest_magnitudes
from qie.compiler.recipe.schema import SchemeName
from qie.engines.machine import cores
from qie.engines.progress import Progress

__all__ = ["Found", "LinearStatistics"]

ROWS = 512
"""Tokens, over all samples, on which a smoothing is tried."""

THREADS = cores()
"""Groups whose smoothing is searched at once."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """Statistics of the linears of a component.

    Attributes:
        amax: linear -> largest magnitude of each channel of its input [in]; also of queries, keys and values.
        smoothing_scales: scheme -> group -> smoothing scales [channels].
        alphas: scheme -> group -> the alpha of these scales.
    """

    amax: dict[str, Array] = field(default_factory=dict)
    smoothing_scales: dict[SchemeName, dict[str, Array]] = field(default_factory=dict)
    alphas: dict[SchemeName, dict[str, float]] = field(default_factory=dict)

    def add(self, scheme: SchemeName, group: str, alpha: float, scales: Array) -> None:
        """Add the smoothing of a group."""
        self.smoothing_scales.setdefault(scheme, {})[group] = scales
        self.alphas.setdefault(scheme, {})[group] = alpha


class LinearStatistics:
    """Runs samples through one graph and records statistics of its linears.

    Attributes:
        found: the statistics so far.
    """

    def __init__(
        self,
        graph: Graph,
        readers: Readers,
        samples: int,
        language: LanguageConfig | None = None,
        *,
        schemes: Collection[SchemeName] = tuple(SCHEMES),
    ) -> None:
        """Observe ``graph`` over ``samples`` samples, for builds with ``schemes``.

        ``language`` is required for the language model.
        """
        self.graph, self.readers, self.samples = graph, readers, samples
        names = linears(graph)
        self.inputs = {name: value for name, value in linear_inputs(graph).items() if name in set(names)}
        self.attentions = attention_inputs(graph)
        self._attentions_of = _by_linear(self.attentions, self.inputs)
        self.groups = smoothing_groups(graph.component, names, language)
        self.schemes = tuple(
            name for name, scheme in SCHEMES.items() if name in schemes and graph.component in scheme.smoothed
        )
        self.found = Found()
        self._fitted_amax: dict[str, Array] = {}
        self._rows: dict[str, list[Array]] = {}

    def run(
        self,
        values: Sequence[Values],
        progress: Progress,
        *,
        preparation: Preparation | None = None,
        start: int = 0,
        reached: Callable[[int], None] = lambda number: None,
        limit: int | None = None,
    ) -> None:
        """Run ``values``, one entry per sample, through the graph in place; see ``blockwise.run``."""
        watch: dict[str, list[str]] = {f"{name}.weight": [value] for name, value in self.inputs.items()}
        for linear, attention in self._attentions_of.items():
            watch[f"{linear}.weight"] += self.attentions[attention]
        run(
            self.graph,
            self.readers,
            values,
            progress,
            watch=watch,
            preparation=preparation,
            after_sample=self._observe,
            after_segment=self._smooth,
            start=start,
            reached=reached,
            limit=limit,
        )

    def _observe(self, segment: Segment, sample: int, values: Values) -> None:
        """Record what the linears of ``segment`` read of one sample."""
        rng = np.random.default_rng(sample)
        readers: dict[str, list[str]] = {}
        for name in self._linears_of(segment):
            readers.setdefault(self.inputs[name], []).append(name)
        for value, names in readers.items():
            x = values[value].reshape(-1, values[value].shape[-1])
            amax = largest_magnitudes(x)
            for name in names:
                _raise(self.found.amax, name, amax)
            if self.schemes:
                count = min(len(x), -(-ROWS // self.samples))
                rows = x[np.sort(rng.choice(len(x), count, replace=False))]
                for name in names:
                    self._rows.setdefault(name, []).append(rows)
                    if sample % 2 == 0:
                        _raise(self._fitted_amax, name, amax)

        for linear in self._linears_of(segment):
            if attention := self._attentions_of.get(linear):
                for name, value in zip(attention_input_names(attention), self.attentions[attention], strict=True):
                    x = values[value].reshape(-1, values[value].shape[-1])
                    _raise(self.found.amax, name, largest_magnitudes(x))

    def _smooth(self, segment: Segment, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Choose the smoothing of the groups of ``segment``, and drop the rows that it was chosen on."""
        names = set(self._linears_of(segment))

        def choose(group: Group) -> dict[SchemeName, tuple[float, Array] | None]:
            rows = {self.inputs[name]: self._judged(name) for name in group.consumers}
            observed = {
                name: Observed(
                    rows=rows[self.inputs[name]], fitted_amax=self._fitted_amax[name], amax=self.found.amax[name]
                )
                for name in group.consumers
            }
            weights = {name: tensors[f"{name}.weight"] for name in group.consumers}
            return {scheme: best_smoothing(group, SCHEMES[scheme], observed, weights) for scheme in self.schemes}

        groups = [group for group in self.groups if self.schemes and names.issuperset(group.consumers)]
        with ThreadPoolExecutor(THREADS) as pool:
            for group, chosen in zip(groups, pool.map(choose, groups), strict=True):
                for scheme, smoothing in chosen.items():
                    if smoothing is not None:
                        self.found.add(scheme, group.name, *smoothing)
        for name in names:
            self._rows.pop(name, None)
            self._fitted_amax.pop(name, None)

    def _judged(self, name: str) -> Array:
        """Rows of the input of a linear from the samples that a smoothing is judged on."""
        return np.concatenate(self._rows[name][1::2] or self._rows[name])

    def _linears_of(self, segment: Segment) -> list[str]:
        return [name for weight in segment.weights if (name := weight.name.removesuffix(".weight")) in self.inputs]


def _by_linear(attentions: Collection[str], linears: Collection[str]) -> dict[str, str]:
    """The first linear of each attention, which is in its segment -> the attention."""
    first: dict[str, str] = {}
    for linear in linears:
        for end in [number for number, letter in enumerate(linear) if letter == "."]:
            first.setdefault(linear[:end], linear)
    return {first[attention]: attention for attention in attentions}


def _raise(amax: dict[str, Array], name: str, values: Array) -> None:
    """Let ``amax`` of ``name`` be at least ``values``."""
    amax[name] = np.maximum(amax[name], values) if name in amax else values
