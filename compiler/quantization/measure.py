"""Measures a model for quantization: a calibration over samples of edits, and rankings of its linears.

Language model and transformer run block by block in float32 for all samples at once. While a block's weights are in
memory, the smoothing of its groups is chosen too: the alpha with the smallest output error.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.checkpoint.checkpoint import Checkpoint, digest_cache
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.quantization.block_weights import Readers
from qie.compiler.quantization.blockwise import Values, run
from qie.compiler.quantization.calibration import Calibration, write_calibration
from qie.compiler.quantization.partial import PartialCalibration, Reached
from qie.compiler.quantization.sample_modulation import SampleModulation
from qie.compiler.quantization.samples import (
    CalibrationSample,
    component_values,
    digest,
    prompt_values,
    sample_modulation,
    step_values,
    vision_values,
)
from qie.compiler.quantization.schemes import ALL_SCHEMES, SCHEMES
from qie.compiler.quantization.sensitivity import Sensitivity, sensitivity
from qie.compiler.quantization.statistics import LinearStatistics
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.manifest import Component
from qie.engines.files import replacing
from qie.engines.progress import Progress, no_progress

__all__ = ["calibrate_model", "measure"]


def calibrate_model(
    checkpoint: Checkpoint,
    samples: Sequence[CalibrationSample],
    out: Path,
    *,
    component: Component = "transformer",
    schemes: Sequence[SchemeName] = (),
    measured: Mapping[Component, Collection[SchemeName]] = ALL_SCHEMES,
    budget: float = 0.02,
    ranking: Path | None = None,
    ranking_samples: int = 16,
    progress: Progress = no_progress,
) -> tuple[Calibration, list[Sensitivity]]:
    """Calibrate ``checkpoint`` and rank the linears of ``component`` for each of ``schemes``; write both.

    Args:
        checkpoint: the checkpoint; missing weights are downloaded.
        samples: forward passes to observe.
        out: the calibration file to write.
        component: the component to rank.
        schemes: the schemes to rank for; none for a calibration alone.
        measured: see ``schemes`` of ``measure``.
        budget: relative L2 error that quantization may cause.
        ranking: JSON file to write the rankings into; None to write none.
        ranking_samples: the number of samples used for ranking.
        progress: called with what runs, steps done and steps in all.

    Raises:
        CheckpointError: weights are missing or of another shape.
        RequestError: the model cannot take an image or an instruction.
    """
    check_tokenizer(checkpoint)
    checkpoint = checkpoint.with_weights(progress=partial(progress, "download"))
    readers = checkpoint.readers()
    model = checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    calibration = measure(checkpoint, readers, samples, model=model, schemes=measured, progress=progress)
    values = component_values(component, checkpoint, readers, samples[:ranking_samples], progress) if schemes else []
    rankings = [
        sensitivity(
            checkpoint,
            readers,
            values,
            calibration,
            component=component,
            scheme=scheme,
            budget=budget,
            progress=progress,
        )
        for scheme in schemes
    ]
    calibration = replace(calibration, exclude={f"{component}/{r.scheme}": r.exclude for r in rankings})
    write_calibration(calibration, out)
    if rankings and ranking is not None:
        with replacing(ranking) as temporary:
            temporary.write_text(json.dumps([r.facts() for r in rankings], indent=1) + "\n", encoding="utf-8")
    return calibration, rankings


def measure(
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[CalibrationSample],
    *,
    model: str,
    schemes: Mapping[Component, Collection[SchemeName]] = ALL_SCHEMES,
    partial: PartialCalibration | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """The calibration of ``checkpoint`` over ``samples``, with nothing excluded.

    Args:
        checkpoint: the checkpoint, complete with weights.
        readers: the checkpoint's tensors.
        samples: forward passes to observe.
        model: digest of the checkpoint.
        schemes: component -> schemes to choose its smoothing for; largest magnitudes are measured for all.
        partial: what is kept after every block, from which the next call continues; None to keep nothing.
        progress: called with what runs, segments done and segments in all.

    Raises:
        CheckpointError: weights are missing or of another shape.
        RequestError: the model cannot take an image or an instruction.
    """
    config = checkpoint.model
    modulation = sample_modulation(config, readers, samples)
    statistics = {
        "language": LinearStatistics(
            GRAPHS["language"](config, "float32"),
            readers,
            len(samples),
            config.language,
            schemes=schemes.get("language", ()),
        ),
        "transformer": LinearStatistics(
            GRAPHS["transformer"](config, "float32"), readers, len(samples), schemes=schemes.get("transformer", ())
        ),
    }
    walk = _Walk(readers, statistics, modulation, partial, progress)
    vision = walk.run(GRAPHS["vision"](config, "float32"), lambda: vision_values(config, samples))
    prompts = walk.run(statistics["language"].graph, lambda: prompt_values(checkpoint, samples, vision))
    walk.run(
        statistics["transformer"].graph,
        lambda: step_values(
            config, readers, samples, [values["prompt_embeds"] for values in prompts], modulation, progress
        ),
    )
    found = [each.found for each in statistics.values()]
    asked = {name for names in schemes.values() for name in names}
    used = [name for name, scheme in SCHEMES.items() if scheme.smoothed and name in asked]
    return Calibration(
        model=model,
        name=checkpoint.name,
        data=digest(samples),
        samples=len(samples),
        amax={name: values for each in found for name, values in each.amax.items()},
        smoothing_scales={
            name: {g: v for each in found for g, v in each.smoothing_scales.get(name, {}).items()} for name in used
        },
        alphas={name: {g: v for each in found for g, v in each.alphas.get(name, {}).items()} for name in used},
    )


_ORDER: tuple[Component, ...] = ("vision", "language", "transformer")
"""What a sample runs through; the VAE's encoder, which is short, runs again where the transformer begins."""


class _Walk:
    """Runs samples through the components in order, from where an earlier run stopped."""

    def __init__(
        self,
        readers: Readers,
        statistics: Mapping[str, LinearStatistics],
        modulation: SampleModulation,
        partial: PartialCalibration | None,
        progress: Progress,
    ) -> None:
        self._readers, self._statistics, self._modulation = readers, statistics, modulation
        self._partial, self._progress = partial, progress
        self._reached = None if partial is None else partial.read()
        if self._reached is not None:
            for component, found in self._reached.found.items():
                statistics[component].found = found

    def run(self, graph: Graph, begin: Callable[[], list[Values]]) -> list[Values]:
        """The samples behind ``graph``, in front of which ``begin`` makes them; nothing where it was passed before."""
        component, reached = graph.component, self._reached
        done = 0
        if reached is None:
            samples = begin()
        elif _ORDER.index(reached.component) > _ORDER.index(component):
            return []
        elif reached.component == component:
            samples, done = [dict(values) for values in reached.samples], reached.segments
            if component == "transformer":
                self._modulation.restore(samples)
        else:
            samples = begin()
        self._reached = None

        def keep(segments: int) -> None:
            if self._partial is not None:
                found = {name: each.found for name, each in self._statistics.items()}
                left = [{n: v for n, v in s.items() if n not in ("modulation", "modulation_out")} for s in samples]
                self._partial.write(Reached(component=component, segments=segments, samples=left, found=found))

        if component in self._statistics:
            self._statistics[component].run(
                samples,
                self._progress,
                preparation=self._modulation if component == "transformer" else None,
                start=done,
                reached=keep,
            )
        else:
            run(graph, self._readers, samples, self._progress, start=done, reached=keep)
        return samples
