"""Measures a model for quantization: a calibration over samples of edits, and rankings of its linears.

Language model and transformer run block by block in float32 for all samples at once. While a block's weights are in
memory, the smoothing of its groups is chosen too: the alpha with the smallest output error.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.checkpoint.checkpoint import Checkpoint, digest_cache
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.quantization.blockwise import Readers
from qie.compiler.quantization.calibration import Calibration, write_calibration
from qie.compiler.quantization.samples import (
    CalibrationSample,
    component_values,
    digest,
    language_values,
    transformer_values,
)
from qie.compiler.quantization.schemes import SCHEMES
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
    calibration = measure(checkpoint, readers, samples, model=model, progress=progress)
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
    progress: Progress = no_progress,
) -> Calibration:
    """The calibration of ``checkpoint`` over ``samples``, with nothing excluded.

    Args:
        checkpoint: the checkpoint, complete with weights.
        readers: the checkpoint's tensors.
        samples: forward passes to observe.
        model: digest of the checkpoint.
        progress: called with what runs, segments done and segments in all.

    Raises:
        CheckpointError: weights are missing or of another shape.
        RequestError: the model cannot take an image or an instruction.
    """
    prompts = language_values(checkpoint, readers, samples, progress)
    language = LinearStatistics(
        GRAPHS["language"](checkpoint.model, "float32"), readers, len(samples), checkpoint.model.language
    )
    language.run(prompts, progress)
    prompt_embeds = [values["prompt_embeds"] for values in prompts]
    steps = transformer_values(checkpoint, readers, samples, prompt_embeds, progress)
    transformer = LinearStatistics(GRAPHS["transformer"](checkpoint.model, "float32"), readers, len(samples))
    transformer.run(steps, progress)
    smoothed = [name for name, scheme in SCHEMES.items() if scheme.smoothed]
    return Calibration(
        model=model,
        name=checkpoint.name,
        data=digest(samples),
        samples=len(samples),
        amax=language.amax | transformer.amax,
        smoothing_scales={
            name: language.smoothing_scales.get(name, {}) | transformer.smoothing_scales.get(name, {})
            for name in smoothed
        },
        alphas={name: language.alphas.get(name, {}) | transformer.alphas.get(name, {}) for name in smoothed},
    )
