"""A request on its way through a service: what its caller waits for, and what the service knows of it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.editing.conditioning import Conditioning, EncoderInputs, encode, encoder_inputs
from qie.engines.editing.edit import decode, result, start_noise
from qie.engines.editing.editor import Editor
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Edit, Request
from qie.engines.editing.settings import Settings, resolve
from qie.engines.errors import CancelledError
from qie.engines.inputs.schedule import sigmas
from qie.engines.progress import no_progress

__all__ = [
    "Bucket",
    "Ended",
    "Event",
    "ImageDone",
    "Listener",
    "Preview",
    "StepDone",
    "Submission",
    "ignore",
]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """A sample has taken a step.

    Attributes:
        sample: number of the sample, as in ``Edit.samples``.
        step: steps taken.
        steps: steps in all.
    """

    sample: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a sample would be if its velocity stayed as it is.

    Attributes:
        sample: number of the sample, as in ``Edit.samples``.
        number: of the preview, from 0.
        image: mode RGB.
    """

    sample: int
    number: int
    image: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDone:
    """A sample is complete.

    Attributes:
        sample: number of the sample, as in ``Edit.samples``.
        image: mode RGB.
    """

    sample: int
    image: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The request is done, has failed, or was cancelled: ``Submission.result`` returns at once."""


Event = StepDone | Preview | ImageDone | Ended

Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of a caller that waits for the result alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """What samples of one batch have in common: tensors of the same shapes, and the steps of one schedule.

    Attributes:
        grids: (height, width) in tokens of the images to generate, then of each reference image.
        prompt_tokens: of the instruction.
        negative_tokens: of the negative prompt; None without guidance.
        sigmas: bytes of the schedule.
    """

    grids: tuple[tuple[int, int], ...]
    prompt_tokens: int
    negative_tokens: int | None
    sigmas: bytes


class Submission:
    """A request that was accepted.

    Attributes:
        request: what to edit and how, without its images once they are scaled.
        settings: the request with the defaults of the bundle.
        inputs: of the encoders.
        noise: float32 [B, N, C] of every sample.
        schedule: float32 [S + 1], sigmas.
        numbers: of its samples in the scheduler.
        previews: numbers of the steps behind which there is a preview.
    """

    def __init__(
        self,
        request: Request,
        editor: Editor,
        *,
        previews: int,
        listener: Listener,
        cancel: "Callable[[Submission], None]",
    ) -> None:
        """Check ``request``, scale its images and cut its prompts into tokens; no engine runs.

        Raises:
            RequestError: an image, instruction, seed or option cannot be used.
        """
        manifest = editor.bundle.manifest
        self.request = request
        self.settings: Settings = resolve(request, manifest)
        self.noise: Array = start_noise(request, self.settings, manifest)
        self.schedule: Array = sigmas(
            manifest.model.scheduler, steps=self.settings.steps, noise_tokens=self.settings.size.tokens
        )
        self.inputs: EncoderInputs = encoder_inputs(editor.stages, editor.tokenizer, request, self.settings)
        if not request.match_input:  # nothing reads the images again, which may be large and wait for long
            self.request = replace(request, images=())
        self.numbers: list[int] = []
        steps = self.settings.steps
        self.previews: tuple[int, ...] = tuple(
            sorted({round(steps * number / (previews + 1)) for number in range(1, previews + 1)} - {0, steps})
        )
        self._editor, self._listener, self._cancel = editor, listener, cancel
        self._meter = Meter(no_progress)
        self._conditioning: Conditioning | None = None
        self._images: dict[int, Image.Image] = {}
        self._problem: Exception | None = None
        self._ended = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether it is done, has failed, or was cancelled."""
        return self._ended.is_set()

    def bucket(self, sample: int) -> Bucket:
        """The bucket of the sample number ``sample``."""
        instruction, _ = self.settings.samples[sample]
        prompts = self.inputs.prompts
        return Bucket(
            grids=self.inputs.grids,
            prompt_tokens=prompts[instruction].input_ids.shape[1],
            negative_tokens=prompts[-1].input_ids.shape[1] if self.settings.guided else None,
            sigmas=self.schedule.tobytes(),
        )

    def result(self, timeout: float | None = None) -> Edit:
        """Wait for the result.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: it is not there yet.
            QieError: the edit failed, was cancelled (``CancelledError``), or was late (``LateError``).
        """
        if not self._ended.wait(timeout):
            raise TimeoutError
        if self._problem is not None:
            raise self._problem
        return result(self._editor.bundle, self.request, self.settings, self._images, self._meter.seconds)

    def cancel(self) -> None:
        """Do not edit any further; nothing where it has ended."""
        self.fail(CancelledError("the edit was cancelled; ask for it again"))
        self._cancel(self)

    def conditioning(self) -> Conditioning:
        """What the transformer reads; the encoders run once for all samples.

        Raises:
            BackendMissingError, BundleError: an engine cannot be loaded.
            EngineError: a backend failed or memory ran out.
        """
        if self._conditioning is None:
            editor = self._editor
            self._conditioning = encode(
                editor.stages, self.inputs, meter=self._meter, encoder_cache=editor.encoder_cache
            )
        return self._conditioning

    def step_done(self, sample: int, step: int) -> None:
        """Tell the caller about a step."""
        self._listener(StepDone(sample=sample, step=step, steps=self.settings.steps))

    def preview(self, sample: int, step: int, latents_NC: Array) -> None:
        """Decode what would be the latents behind the last step, and tell the caller."""
        image = decode(self._editor.stages, latents_NC, self.request, self.settings)
        self._listener(Preview(sample=sample, number=self.previews.index(step), image=image))

    def image_done(self, sample: int, image: Image.Image) -> None:
        """Keep the image of a sample and tell the caller; behind the last one the request is done."""
        self._images[sample] = image
        self._listener(ImageDone(sample=sample, image=image))
        if len(self._images) == len(self.settings.samples):
            self._end()

    def fail(self, problem: Exception) -> None:
        """Let ``result`` raise ``problem``; nothing where the request has ended."""
        if not self.ended:
            self._problem = problem
            self._end()

    def _end(self) -> None:
        self._ended.set()
        self._listener(Ended())
