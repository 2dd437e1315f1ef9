"""An edit: from images and instructions to edited images, as one numbered sequence of stages.

Shape suffixes: B images to generate, L text tokens, N noise tokens, S steps + 1, R reference tokens, D width of the
language model, C = 64 latent channels of a token, h w latent tokens of an image.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Manifest
from qie.engines.editing.conditioning import condition
from qie.engines.editing.denoise import Denoiser, StepObserver, denoise, upload_schedule
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Edit, Request
from qie.engines.editing.settings import Settings, resolve
from qie.engines.editing.stages import Stages
from qie.engines.errors import RequestError
from qie.engines.inputs.image import resize
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.rotary import noise_latents
from qie.engines.inputs.schedule import sigmas
from qie.engines.progress import Progress, StageProgress

__all__ = ["edit", "start_noise"]

Array = NDArray[np.float32]


def edit(
    stages: Stages, tokenizer: Tokenizer, request: Request, *, progress: Progress, observer: StepObserver | None = None
) -> Edit:
    """Edit ``request.images`` by every instruction with every seed; see ``Editor.edit``.

    Raises:
        RequestError: an image, instruction, seed or option cannot be used.
        EngineError: a backend failed or memory ran out.
    """
    manifest, model = stages.bundle.manifest, stages.bundle.manifest.model
    meter = Meter(progress)

    # 1. Fill in defaults and check the request; then noise and schedule.
    settings = resolve(request, manifest)
    noise_BNC = start_noise(request, settings, manifest)
    schedule_S = sigmas(model.scheduler, steps=settings.steps, noise_tokens=settings.size.tokens)

    # 2. Images and instructions to prompt embeddings and reference latents.
    conditioning = condition(stages, tokenizer, request, settings, meter=meter)

    # 3. The modulation of every step.
    with meter("modulation") as report:
        tables = modulation_tables(stages.bundle, schedule_S, progress=report)

    # 4. Denoise. Prompts of one length make a batch, so nothing is padded and no result depends on its batch.
    instructions = [instruction for instruction, _ in settings.samples]
    lengths = [conditioning.prompts[instruction].shape[1] for instruction in instructions]
    batches = list(_batches(lengths, manifest.limits.batch_max))
    latents: dict[int, Array] = {}
    with meter("denoise") as report, stages.session("transformer") as session:
        schedule = upload_schedule(session, schedule_S, tables)
        for number, batch in enumerate(batches):
            denoiser = Denoiser.start(
                session,
                schedule=schedule,
                noise_BNC=noise_BNC[batch],
                reference_1RC=conditioning.reference,
                prompt_BLD=np.concatenate([conditioning.prompts[instructions[b]] for b in batch]),
                negative_1LD=conditioning.negative,
                guidance=settings.guidance,
                rotary=model.rotary,
                grids=conditioning.grids,
            )
            done_in_batch = partial(_report_batch, report, number, len(batches))
            latents_BNC = denoise(denoiser, progress=done_in_batch, observer=observer)
            latents |= zip(batch, latents_BNC, strict=True)

    # 5. Latents to pixels.
    with meter("decode") as report:
        order = range(len(settings.samples))
        latents_hwC = [latents[b].reshape(*conditioning.grids[0], -1) for b in order]
        images = [Image.fromarray(image_HWC) for image_HWC in stages.decode(latents_hwC, progress=report)]
        if request.match_input:
            images = [_resized(image, request.images[-1].size) for image in images]
    return Edit(
        images=tuple(images),
        samples=tuple((request.instructions[instruction], seed) for instruction, seed in settings.samples),
        size=settings.size,
        steps=settings.steps,
        guidance=settings.guidance,
        notes=(*settings.notes, *_replaced(stages.bundle)),
        seconds=meter.seconds,
    )


def _replaced(bundle: Bundle) -> tuple[str, ...]:
    """A note where another bundle has taken the name of the one that was used, or it was deleted."""
    if not bundle.folder.replaced:
        return ()
    return (f"the bundle {bundle.path} was replaced or deleted meanwhile, and this is its earlier version",)


def start_noise(request: Request, settings: Settings, manifest: Manifest) -> Array:
    """The start latents float32 [B, N, C] of every sample: the request's, or those of the seeds.

    Raises:
        RequestError: a seed or the noise cannot be used.
    """
    expected = (len(settings.samples), settings.size.tokens, 4 * manifest.model.latent_channels)
    if request.noise is not None:
        noise = request.noise
        if noise.shape != expected or noise.dtype != np.float32 or not np.isfinite(noise).all():
            raise RequestError(
                f"the noise is {noise.dtype} of shape {noise.shape}; give finite float32 values of shape {expected}",
                option="noise",
            )
        return noise
    seeds = [seed for _, seed in settings.samples]
    size, dtype = settings.size, manifest.defaults.noise
    return noise_latents(seeds, size.height, size.width, manifest.model.latent_channels, dtype)


def _batches(lengths: Sequence[int], batch_max: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` in groups of one length, at most ``batch_max`` in a group."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, group in groupby(order, key=lambda i: lengths[i]):
        members = list(group)
        for start in range(0, len(members), batch_max):
            yield members[start : start + batch_max]


def _report_batch(report: StageProgress, batch: int, batches: int, done: int, total: int) -> None:
    report(batch * total + done, batches * total)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else resize(image, *size)
