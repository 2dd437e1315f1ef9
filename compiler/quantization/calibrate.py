"""Calibration of a model: statistics of the linears of language model and transformer over samples of edits.

Both run block by block in float32 for all samples at once. While a block's weights are in memory, the smoothing of its
groups is chosen too: the alpha with the least error of the products.
"""

from collections.abc import Sequence

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.quantization.blockwise import Readers
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.observe import Observer
from qie.compiler.quantization.samples import CalibrationSample, digest, language_values, transformer_values
from qie.compiler.quantization.schemes import SCHEMES
from qie.engines.progress import Progress, no_progress

__all__ = ["calibrate"]


def calibrate(
    checkpoint: Checkpoint,
    readers: Readers,
    samples: Sequence[CalibrationSample],
    *,
    model: str,
    progress: Progress = no_progress,
) -> Calibration:
    """Calibrate ``checkpoint`` over ``samples``.

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
    language = Observer(
        GRAPHS["language"](checkpoint.model, "float32"), readers, len(samples), checkpoint.model.language
    )
    language.run(prompts, progress)
    prompt_embeds = [values["prompt_embeds"] for values in prompts]
    steps = transformer_values(checkpoint, readers, samples, prompt_embeds, progress)
    transformer = Observer(GRAPHS["transformer"](checkpoint.model, "float32"), readers, len(samples))
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
