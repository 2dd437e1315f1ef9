"""Calibrates a model: what its linears are given, seen over samples of edits, and what follows for each scheme.

Language model and transformer run block by block, in float32, for all samples at once. While a block's weights are
there, the smoothing of its groups is decided too: the alpha with the least error of the products themselves.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.quantization.blockwise import Segment, Values
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.qdq import QUANTIZATION, Scheme, attentions, linears, operands, products
from qie.compiler.quantization.samples import (
    Progress,
    Readers,
    Sample,
    digest,
    language_values,
    run,
    transformer_values,
)
from qie.compiler.quantization.smoothing import Group, factor, groups
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.manifest import Component

__all__ = ["Observer", "calibrate"]

ALPHAS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

ROWS = 512
"""Tokens of all samples on which a smoothing is tried."""

WORTH = 0.95
"""A smoothing that costs a multiplication must bring the error under this share of what it is without."""

SMOOTHED: dict[Component, tuple[SchemeName, ...]] = {
    "language": ("int8-smooth", "w8a16", "w4a16"),
    "transformer": ("int8-smooth",),
}
"""The schemes with smoothing that a component may have."""

Array = NDArray[np.float32]


def calibrate(
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[Sample],
    *,
    model: str,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """The calibration of ``checkpoint``, whose digest is ``model``, over ``samples``.

    Raises:
        CheckpointError: weights are missing or of another shape.
        RequestError: a picture or an instruction is one that the model cannot take.
    """
    words = language_values(checkpoint, readers, samples, progress)
    graphs = {component: GRAPHS[component](checkpoint.model, "float32") for component in SMOOTHED}
    language = Observer(graphs["language"], readers, len(samples), checkpoint.model.language)
    language.run(words, progress)
    prompts = [values["prompt_embeds"] for values in words]
    steps = transformer_values(checkpoint, readers, samples, prompts, progress)
    transformer = Observer(graphs["transformer"], readers, len(samples))
    transformer.run(steps, progress)
    schemes = tuple(dict.fromkeys(scheme for both in SMOOTHED.values() for scheme in both))
    return Calibration(
        model=model,
        name=checkpoint.name,
        data=digest(samples),
        samples=len(samples),
        amax={**language.amax, **transformer.amax},
        smoothing_scales={
            s: {**language.smoothing_scales.get(s, {}), **transformer.smoothing_scales.get(s, {})} for s in schemes
        },
        alphas={s: {**language.alphas.get(s, {}), **transformer.alphas.get(s, {})} for s in schemes},
    )


class Observer:
    """Watches the inputs of one graph's linears over ``samples``, and decides the smoothing of each block when it is
    done. ``language`` is the config of the graph that is the language model's."""

    def __init__(self, graph: Graph, readers: Readers, samples: int, language: LanguageConfig | None = None) -> None:
        self.graph, self.readers, self.samples = graph, readers, samples
        self.reader = readers[graph.subfolder]
        names = linears(graph)
        self.inputs = {name: value for name, value in products(graph).items() if name in set(names)}
        self.attentions = attentions(graph)
        self.groups = groups(graph.component, names, language)
        self.schemes = SMOOTHED[graph.component]
        self.amax: dict[str, Array] = {}
        self.smoothing_scales: dict[SchemeName, dict[str, Array]] = {scheme: {} for scheme in self.schemes}
        self.alphas: dict[SchemeName, dict[str, float]] = {scheme: {} for scheme in self.schemes}
        self._fitted: dict[str, Array] = {}
        self._rows: dict[str, list[Array]] = {}

    def run(self, values: Sequence[Values], progress: Progress, *, pieces: int | None = None) -> None:
        """Run ``values``, in place, through the graph, or through its first ``pieces``."""
        watch: dict[str, list[str]] = {f"{name}.weight": [value] for name, value in self.inputs.items()}
        for piece, name in self._attentions():
            watch[piece] += self.attentions[name]
        run(
            self.graph,
            self.readers,
            values,
            progress,
            watch=watch,
            observer=self._see,
            after=self._decide,
            pieces=pieces,
        )

    def _see(self, piece: Segment, sample: int, values: Values) -> None:
        rng = np.random.default_rng(sample)
        drawn: dict[str, Array] = {}
        for name in self._own(piece):
            value = self.inputs[name]
            x = values[value].reshape(-1, values[value].shape[-1])
            most = np.abs(x).max(0)
            _raise(self.amax, name, most)
            if sample % 2 == 0:
                _raise(self._fitted, name, most)
            if value not in drawn:
                count = min(len(x), -(-ROWS // self.samples))
                drawn[value] = x[np.sort(rng.choice(len(x), count, replace=False))]
            self._rows.setdefault(name, []).append(drawn[value])

        own = {f"{name}.weight" for name in self._own(piece)}
        for weight, attention in self._attentions():
            if weight in own:
                for name, value in zip(operands(attention), self.attentions[attention], strict=True):
                    _raise(self.amax, name, np.abs(values[value]).reshape(-1, values[value].shape[-1]).max(0))

    def _attentions(self) -> list[tuple[str, str]]:
        """A weight in front of each attention, and its name."""
        return [
            (next(f"{linear}.weight" for linear in self.inputs if linear.startswith(f"{name}.")), name)
            for name in self.attentions
        ]

    def _decide(self, piece: Segment) -> None:
        own = set(self._own(piece))
        for group in self.groups:
            if own.issuperset(group.readers):
                rows = {name: np.concatenate(self._rows[name][1::2] or self._rows[name]) for name in group.readers}
                weights = {name: self.reader.read(f"{name}.weight").astype(np.float32).T for name in group.readers}
                for scheme in self.schemes:
                    chosen = self._smoothing(group, QUANTIZATION[scheme], rows, weights)
                    if chosen is not None:
                        self.alphas[scheme][group.name], self.smoothing_scales[scheme][group.name] = chosen
        for name in own:
            self._rows.pop(name, None)
            self._fitted.pop(name, None)

    def _own(self, piece: Segment) -> list[str]:
        names = {weight.name.removesuffix(".weight") for weight in piece.weights}
        return [name for name in self.inputs if name in names]

    def _smoothing(
        self, group: Group, scheme: Scheme, rows: Mapping[str, Array], weights: Mapping[str, Array]
    ) -> tuple[float, Array] | None:
        """Alpha and factors with the least error, None where leaving the group alone is as good.

        Static scales of inputs follow the largest magnitude (SmoothQuant), groups of weights their mean (AWQ). Factors
        are fitted to every other sample and judged on the rest, since a channel that fills its range is cut off where
        another sample has more of it; those of the alpha that is chosen are then made of all.
        """
        names = group.readers
        if scheme.inputs is None:
            inputs = np.mean([np.abs(rows[name]).mean(0) for name in names], axis=0)
        else:
            inputs = np.max([self._fitted[name] for name in names], axis=0)
        widest = np.max([np.abs(weights[name]).max(1) for name in names], axis=0)
        inputs, widest = group.most(inputs), group.most(widest)
        exact = {name: rows[name] @ weights[name] for name in names}

        def error(factors: Array) -> float:
            found = 0.0
            for name in names:
                spread = group.spread(factors)
                x = rows[name] / spread
                if scheme.inputs is not None:
                    x = scheme.inputs.rounded(x, scheme.inputs.scale_of((self._fitted[name] / spread).max()))
                made = x @ scheme.weights.rounded(weights[name] * spread[:, None])
                found += float(np.square(made - exact[name]).mean() / np.square(exact[name]).mean())
            return found

        least = error(np.ones(len(inputs), np.float32)) * (1.0 if group.makers else WORTH)
        chosen = None
        for alpha in ALPHAS:
            factors = factor(inputs, widest, alpha)
            if (found := error(factors)) < least:
                least, chosen = found, alpha
        if chosen is None:
            return None
        if scheme.inputs is not None:
            inputs = group.most(np.max([self.amax[name] for name in names], axis=0))
        return chosen, factor(inputs, widest, chosen)


def _raise(most: dict[str, Array], name: str, found: Array) -> None:
    """Let ``most`` of a name be at least what was found."""
    most[name] = np.maximum(most[name], found) if name in most else found
