"""The editor: from images and instructions to edited images, as one numbered sequence of stages.

Shape suffixes: B images to generate, V image tokens of the prompt, L text tokens, N noise tokens, R reference tokens,
D width of the language model, C = 64 latent channels of a token, h w latent tokens of an image.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import Residency
from qie.engines.editing.conditioning import condition, open_tokenizer
from qie.engines.editing.denoise import Denoiser, Observer, denoise, upload_schedule
from qie.engines.editing.progress import Meter, Progress
from qie.engines.editing.request import Edit, Request, Settings, resolve
from qie.engines.editing.stages import Stages
from qie.engines.errors import QieError
from qie.engines.inputs.image import resize
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.rotary import noise_latents
from qie.engines.inputs.schedule import sigmas

__all__ = ["Editor"]

Array = NDArray[np.float32]


class Editor:
    """Runs edits with the engines of one bundle; ``with Editor(...) as editor`` closes it.

    Attributes:
        bundle: the opened bundle.
        model: constants of its model.
        stages: its engines as functions.
        tokenizer: of its model.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path | None = None,
        *,
        residency: Residency | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Open a bundle and choose the engines for this machine; they are loaded when first needed.

        Args:
            bundle: an opened bundle, or a name or folder of one; None is the newest.
            residency: "resident" keeps engines loaded, "sequential" releases each after its stage; None is the bundle's
                default.
            cuda_graphs: capture repeated runs as CUDA graphs on a GPU.

        Raises:
            BundleError: there is no such bundle, or it is incomplete or damaged.
            EngineMismatchError, BackendMissingError: see ``choose_engines``.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.model = self.bundle.manifest.model
        self.stages = Stages(self.bundle, residency=residency, cuda_graphs=cuda_graphs)
        self.tokenizer = open_tokenizer(self.bundle)
        weakref.finalize(self, _close_quietly, self.stages)  # also at interpreter exit

    def edit(
        self,
        request: Request,
        *,
        progress: Progress = lambda stage, done, total: None,
        observer: Observer | None = None,
    ) -> Edit:
        """Edit ``request.images`` by every instruction with every seed.

        ``progress`` is called with (stage, units done, units in all). ``observer`` sees every step, for which its
        tensors are copied to the host.

        Raises:
            RequestError: an image, instruction, seed or option cannot be used.
            EngineError: a backend failed or memory ran out.
        """
        meter = Meter(progress)

        # 1. Fill in defaults and check the request; then noise and schedule.
        settings = resolve(request, self.bundle.manifest)
        noise_BNC = self.noise(request, settings)
        schedule_S = sigmas(self.model.scheduler, steps=settings.steps, noise_tokens=settings.size.tokens)

        # 2. Images and instructions to prompt embeddings and reference latents.
        conditioning = condition(self.stages, self.tokenizer, request, settings, meter=meter)

        # 3. The modulation of every step.
        with meter("modulation") as report:
            tables = modulation_tables(self.bundle.path, self.model.modulation, schedule_S, progress=report)

        # 4. Denoise. Prompts of one length make a batch, so nothing is padded and no result depends on its batch.
        instructions = [instruction for instruction, _ in settings.samples]
        lengths = [conditioning.prompts[instruction].shape[1] for instruction in instructions]
        batches = list(_batches(lengths, self.bundle.manifest.limits.batch_max))
        latents: dict[int, Array] = {}
        with meter("denoise") as report, self.stages.session("transformer") as session:
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
                    rotary=self.model.rotary,
                    grids=conditioning.grids,
                )
                done_in_batch = partial(_report_batch, report, number, len(batches))
                latents_BNC = denoise(denoiser, progress=done_in_batch, observer=observer)
                latents |= zip(batch, latents_BNC, strict=True)

        # 5. Latents to pixels.
        with meter("decode") as report:
            order = range(len(settings.samples))
            latents_hwC = [latents[b].reshape(*conditioning.grids[0], -1) for b in order]
            images = [Image.fromarray(image_HWC) for image_HWC in self.stages.decode(latents_hwC, progress=report)]
            if request.match_input:
                images = [_resized(image, request.images[-1].size) for image in images]
        return Edit(
            images=tuple(images),
            samples=tuple((request.instructions[instruction], seed) for instruction, seed in settings.samples),
            size=settings.size,
            steps=settings.steps,
            guidance=settings.guidance,
            notes=settings.notes,
            seconds=meter.seconds,
        )

    def noise(self, request: Request, settings: Settings) -> Array:
        """The start latents float32 [B, N, C] of every sample: the request's, or those of the seeds.

        Raises:
            RequestError: a seed cannot be used.
        """
        if request.noise is not None:
            return request.noise
        seeds = [seed for _, seed in settings.samples]
        size, dtype = settings.size, self.bundle.manifest.defaults.noise
        return noise_latents(seeds, size.height, size.width, self.model.latent_channels, dtype)

    def close(self) -> None:
        """Release all engines and the GPU; the next edit would load them again. Closing twice is allowed."""
        self.stages.close()

    def __enter__(self) -> "Editor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_quietly(stages: Stages) -> None:
    """Close what an editor left open; there is nobody left to handle a failure of the GPU."""
    with suppress(QieError):
        stages.close()


def _batches(lengths: Sequence[int], batch_max: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` in groups of one length, at most ``batch_max`` in a group."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, group in groupby(order, key=lambda i: lengths[i]):
        members = list(group)
        for start in range(0, len(members), batch_max):
            yield members[start : start + batch_max]


def _report_batch(report: Callable[[int, int], None], batch: int, batches: int, done: int, total: int) -> None:
    report(batch * total + done, batches * total)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else resize(image, *size)
