"""An edit: from images and instructions to edited images, as one numbered sequence of stages.

Shape suffixes: B images to generate, L text tokens, N noise tokens, S steps + 1, R reference tokens, D width of the
language model, C = 64 latent channels of a token, h w latent tokens of an image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord, Manifest
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.editing.conditioning import Conditioning, condition
from qie.engines.editing.denoise import Denoiser, Row, StepObserver, denoise, upload_schedule
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Edit, Request
from qie.engines.editing.settings import Settings, resolve
from qie.engines.editing.stages import Stages
from qie.engines.errors import EngineError, RequestError
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.prepare import resize
from qie.engines.inputs.rotary import noise_latents
from qie.engines.inputs.schedule import sigmas
from qie.engines.progress import Progress, StageProgress

__all__ = ["ImageObserver", "check_finite", "decode", "edit", "result", "row_of", "start_noise", "table_dtype"]

Array = NDArray[np.float32]

ImageObserver = Callable[[int, Image.Image], None]
"""Called with the number of a sample and its image as soon as that is decoded."""


def edit(
    stages: Stages,
    tokenizer: Tokenizer,
    request: Request,
    *,
    progress: Progress,
    observer: StepObserver | None = None,
    on_image: ImageObserver | None = None,
    encoder_cache: EncoderCache | None = None,
) -> Edit:
    """Edit ``request.images`` by every instruction with every seed; see ``Editor.edit``.

    Without ``encoder_cache`` every engine runs.

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
    conditioning = condition(stages, tokenizer, request, settings, meter=meter, encoder_cache=encoder_cache)

    # 3. The modulation of every step, unless the GPU has it of the edit before.
    schedule = stages.schedule(schedule_S)
    if schedule is None:
        with meter("modulation") as report:
            dtype = table_dtype(stages.engines["transformer"])
            tables = modulation_tables(stages.bundle, schedule_S, dtype=dtype, progress=report)

    # 4. Denoise. Prompts of one length make a batch, so nothing is padded and no result depends on its batch.
    instructions = [instruction for instruction, _ in settings.samples]
    lengths = [conditioning.prompts[instruction].shape[1] for instruction in instructions]
    batches = list(_batches(lengths, manifest.limits.batch_max))
    latents: dict[int, Array] = {}
    images: dict[int, Image.Image] = {}
    with stages.session("transformer") as session:
        if schedule is None:
            with meter("denoise"):
                schedule = upload_schedule(session, schedule_S, tables)
            stages.keep_schedule(schedule_S, schedule)
        for number, batch in enumerate(batches):
            with meter("denoise") as report:
                rows = [row_of(conditioning, settings, noise_BNC, b) for b in batch]
                denoiser = Denoiser.start(
                    session, rows, schedule=schedule, rotary=model.rotary, grids=conditioning.grids
                )
                done_in_batch = partial(_report_batch, report, number, len(batches))
                latents_BNC = denoise(denoiser, progress=done_in_batch, observer=observer)
            check_finite(latents_BNC, stages.bundle)
            latents |= zip(batch, latents_BNC, strict=True)

            # 5. Latents to pixels: of each batch at once where that loads no engine twice, otherwise in the end.
            if number + 1 < len(batches) and stages.loads_cheaply:
                images |= _decoded(stages, latents, request, settings, meter, on_image, done=len(images))
                latents = {}
    images |= _decoded(stages, latents, request, settings, meter, on_image, done=len(images))
    return result(stages.bundle, request, settings, images, meter.seconds)


def result(
    bundle: Bundle, request: Request, settings: Settings, images: Mapping[int, Image.Image], seconds: dict[str, float]
) -> Edit:
    """The result of ``request``, all of whose samples are in ``images`` by their number."""
    return Edit(
        images=tuple(images[number] for number in range(len(images))),
        samples=tuple((request.instructions[instruction], seed) for instruction, seed in settings.samples),
        size=settings.size,
        steps=settings.steps,
        guidance=settings.guidance,
        notes=(*settings.notes, *_replaced(bundle)),
        seconds=seconds,
    )


def row_of(conditioning: Conditioning, settings: Settings, noise_BNC: Array, sample: int) -> Row:
    """The image number ``sample`` of ``settings`` before its first step."""
    instruction, _ = settings.samples[sample]
    return Row(
        latents=noise_BNC[sample],
        reference=conditioning.reference[0],
        prompt=conditioning.prompts[instruction][0],
        negative=None if conditioning.negative is None else conditioning.negative[0],
        guidance=settings.guidance,
    )


def table_dtype(engines: Sequence[EngineRecord]) -> Literal["float32", "bfloat16"]:
    """The dtype in which the transformer, of these parts, reads its modulation."""
    (dtype,) = (spec.dtype for spec in engines[0].inputs if spec.name == "modulation")
    return "bfloat16" if dtype == "bfloat16" else "float32"


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


def _decoded(
    stages: Stages,
    latents: Mapping[int, Array],
    request: Request,
    settings: Settings,
    meter: Meter,
    on_image: ImageObserver | None,
    *,
    done: int,
) -> dict[int, Image.Image]:
    """The images of ``latents`` [N, C] by the number of their sample, where ``done`` images were decoded before."""
    total, images = len(settings.samples), {}
    with meter("decode") as report, stages.session("vae_decoder"):
        report(done, total)
        for number, latents_NC in sorted(latents.items()):
            images[number] = decode(stages, latents_NC, request, settings)
            report(done + len(images), total)
            if on_image is not None:
                on_image(number, images[number])
    return images


def decode(stages: Stages, latents_NC: Array, request: Request, settings: Settings) -> Image.Image:
    """The image of ``latents_NC`` behind the last step.

    Raises:
        EngineError: the backend failed or memory ran out.
    """
    height, width = settings.size.height // SIDE_MULTIPLE, settings.size.width // SIDE_MULTIPLE
    (image_HWC,) = stages.decode([latents_NC.reshape(height, width, -1)])
    image = Image.fromarray(image_HWC)
    return _resized(image, request.images[-1].size) if request.match_input else image


def check_finite(latents: Array, bundle: Bundle) -> None:
    """Check latents behind the last step.

    Raises:
        EngineError: a value is infinite or NaN.
    """
    if not np.isfinite(latents).all():
        raise EngineError(
            f"the transformer of {bundle.path} gives latents that are not finite; check the bundle with `qie inspect "
            "--verify`, the weights of its LoRAs, and the guidance scale"
        )


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
