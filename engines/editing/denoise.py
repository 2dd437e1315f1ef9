"""The denoising loop: from noise to latents along a schedule, one or two passes of the transformer per step.

A pass is one of diffusers' ``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` (__call__, 6. Denoising loop);
guidance and the Euler step are inside the engine.

Shape suffixes: B images of the batch, N noise tokens, R reference tokens, L text tokens, D width of the prompt
embeddings, C latent channels of a token, S steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import RotarySpec
from qie.engines.inputs.feeds import (
    Feed,
    guidance_feed,
    guidance_inputs,
    guidance_scales,
    latents_feed,
    schedule_feed,
    step_feed,
    text_feed,
)
from qie.engines.inputs.modulation import Tables
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.session import Session, Tensor

__all__ = ["Denoiser", "Row", "StepObserver", "StepState", "UploadedSchedule", "denoise", "upload_schedule"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepState:
    """One step as an observer sees it.

    Attributes:
        step: number of the step, from 0.
        sigma: of the step.
        latents: float32 [B, N, C], before the step.
        velocity: float32 [B, N, C], of the conditional pass, before guidance.
        negative_velocity: float32 [B, N, C], of the negative pass; None without guidance.
    """

    step: int
    sigma: float
    latents: Array
    velocity: Array
    negative_velocity: Array | None


StepObserver = Callable[[StepState], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UploadedSchedule:
    """The steps of a schedule in the memory of the engine.

    Attributes:
        sigmas: of each step.
        inputs: the engine's inputs that hold all steps.
    """

    sigmas: tuple[float, ...]
    inputs: dict[str, Tensor]


def upload_schedule(session: Session, schedule: Array, tables: Tables) -> UploadedSchedule:
    """Upload the steps of ``schedule`` [S + 1] with the modulation of each, once for all edits with it."""
    feed = schedule_feed(tables.blocks, tables.out, np.diff(schedule).astype(np.float32))
    return UploadedSchedule(sigmas=tuple(float(sigma) for sigma in schedule[:-1]), inputs=_upload(session, feed))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """An image of a batch, as its steps read it.

    Attributes:
        latents: float32 [N, C], before its next step.
        reference: float32 [R, C], latents of its reference images, one after the other.
        prompt: float32 [L, D], prompt embeddings.
        negative: float32 [M, D], embeddings of the negative prompt; None without guidance.
        guidance: scale of classifier-free guidance.
        step: number of its next step.
    """

    latents: Array
    reference: Array
    prompt: Array
    negative: Array | None
    guidance: float
    step: int = 0


class Denoiser:
    """The denoising of a batch of images of one size; its unit is a step, and each image may be at a step of its own.

    ``Denoiser.start`` uploads everything. ``step`` allocates nothing, copies nothing to the host and waits for nothing.
    A session that ``rebinds`` gets the numbers of the steps as other tensors, and latents and next latents swap. Any
    other session gets the same tensors in every run, and new values are copied into them within its own memory.

    Attributes:
        shape: (B, N, C) of the latents.
        steps: steps that can be taken, until the first image has taken its last one.
        steps_done: steps taken or skipped so far.
    """

    def __init__(
        self,
        session: Session,
        schedule: UploadedSchedule,
        *,
        shape: tuple[int, ...],
        first_steps: Sequence[int],
        step_inputs: Sequence[dict[str, Tensor]],
        inputs: dict[str, Tensor],
        negative_inputs: dict[str, Tensor] | None,
        outputs: dict[str, Tensor],
        negative_outputs: dict[str, Tensor] | None,
    ) -> None:
        """Use ``start``."""
        self._session, self._schedule, self._step_inputs = session, schedule, step_inputs
        self._first_steps = tuple(first_steps)
        self._inputs, self._outputs = inputs, outputs
        self._negative_inputs, self._negative_outputs = negative_inputs, negative_outputs
        self._latents, self._latents_next = inputs["latents"], outputs["latents_next"]
        self.shape = shape
        self.steps, self.steps_done = len(step_inputs), 0
        self._ran = False

    @classmethod
    def start(
        cls,
        session: Session,
        rows: Sequence[Row],
        *,
        schedule: UploadedSchedule,
        rotary: RotarySpec,
        grids: Sequence[tuple[int, int]],
    ) -> "Denoiser":
        """Upload what the steps of a batch read.

        Args:
            session: of the transformer.
            rows: the images; arrays of one field have one shape, and all of them have a negative prompt or none has.
            schedule: of all of them, from ``upload_schedule`` with the same session.
            rotary: constants of the model's rotary embedding.
            grids: (height, width) in tokens of the images being generated, then of each reference image.

        Raises:
            RequestError: a prompt is too long for images of this size.
            EngineError: the GPU is out of memory.
        """
        latents_BNC = np.stack([row.latents for row in rows])
        batch, noise_tokens, _ = latents_BNC.shape
        sizes = {"batch": batch, "noise_tokens": noise_tokens}
        first_steps = [row.step for row in rows]

        # 1. What both passes read: latents, references, the schedule, and at which of its steps each image is.
        latents = latents_feed(latents_BNC, np.stack([row.reference for row in rows]))
        shared = _upload(session, latents | step_feed(first_steps)) | schedule.inputs
        steps = len(schedule.sigmas) - max(first_steps)
        step_inputs = [_upload(session, step_feed([first + n for first in first_steps])) for n in range(steps)]

        # 2. The conditional pass, unguided so far.
        unguided = _upload(session, guidance_feed(np.zeros_like(latents_BNC), [1.0] * batch))
        prompt_BLD = np.stack([row.prompt for row in rows])
        inputs = shared | _upload(session, text_feed(prompt_BLD, rotary, grids)) | unguided
        outputs = {name: session.empty(name, sizes) for name in ("velocity", "latents_next")}

        # 3. The negative pass runs first and unguided; its velocity then guides the conditional pass.
        negative_inputs = negative_outputs = None
        negatives = [row.negative for row in rows if row.negative is not None]
        if negatives:
            negative_inputs = shared | _upload(session, text_feed(np.stack(negatives), rotary, grids)) | unguided
            negative_outputs = {name: session.empty(name, sizes) for name in ("velocity", "latents_next")}
            scales = session.upload(guidance_scales([row.guidance for row in rows]))
            inputs |= guidance_inputs(negative_outputs["velocity"], scales)
        return cls(
            session,
            schedule,
            shape=latents_BNC.shape,
            first_steps=first_steps,
            step_inputs=step_inputs,
            inputs=inputs,
            negative_inputs=negative_inputs,
            outputs=outputs,
            negative_outputs=negative_outputs,
        )

    @property
    def sigma(self) -> float:
        """Sigma of the next step, of images that are all at the same one."""
        assert len(set(self._first_steps)) == 1, self._first_steps
        return self._schedule.sigmas[self._first_steps[0] + self.steps_done]

    def step(self) -> None:
        """Take one step of every image: the negative pass where there is guidance, then the conditional pass.

        Raises:
            EngineError: the backend failed.
        """
        assert self.steps_done < self.steps, "every step of the schedule was taken"
        session, step_inputs = self._session, self._step_inputs[self.steps_done]
        rebound = step_inputs | {"latents": self._latents} if session.rebinds else {}
        if not session.rebinds:
            for name, tensor in step_inputs.items():
                session.copy(tensor, self._inputs[name])
        if self._negative_inputs is not None and self._negative_outputs is not None:
            session.run(self._negative_inputs | rebound, self._negative_outputs)
        session.run(self._inputs | rebound, self._outputs | {"latents_next": self._latents_next})
        if session.rebinds:
            self._latents, self._latents_next = self._latents_next, self._latents
        else:
            session.copy(self._latents_next, self._latents)
        self.steps_done += 1
        self._ran = True

    def skip(self) -> None:
        """Go on to the step after the next without running the engine; the latents stay as they are.

        ``set_latents`` then gives the latents that the step starts from.
        """
        assert self.steps_done < self.steps, "every step of the schedule was taken"
        self.steps_done += 1

    def latents(self) -> Array:
        """Latents float32 [B, N, C] after the steps so far."""
        return _download(self._session, self._latents)

    def set_latents(self, latents_BNC: Array) -> None:
        """Replace the latents before the next step, to force it onto another trajectory (teacher forcing).

        Args:
            latents_BNC: float32, of the shape of the noise.
        """
        assert latents_BNC.dtype == np.float32, latents_BNC.dtype
        assert latents_BNC.shape == self.shape, (latents_BNC.shape, self.shape)
        self._session.copy(self._session.upload(latents_BNC), self._latents)

    def velocity(self) -> Array:
        """Velocity float32 [B, N, C] of the last step's conditional pass, before guidance."""
        assert self._ran, "no step was taken yet"
        return _download(self._session, self._outputs["velocity"])

    def negative_velocity(self) -> Array | None:
        """Velocity float32 [B, N, C] of the last step's negative pass; None without guidance."""
        assert self._ran, "no step was taken yet"
        if self._negative_outputs is None:
            return None
        return _download(self._session, self._negative_outputs["velocity"])


def denoise(
    denoiser: Denoiser,
    *,
    progress: StageProgress = no_progress,
    observer: StepObserver | None = None,
) -> Array:
    """Take all remaining steps of ``denoiser``: latents float32 [B, N, C] after the last one.

    ``progress`` is called with (steps done, steps in all). ``observer`` sees every step, for which its tensors are
    copied to the host.

    Raises:
        EngineError: the backend failed.
    """
    while denoiser.steps_done < denoiser.steps:
        progress(denoiser.steps_done, denoiser.steps)
        if observer is None:
            denoiser.step()
        else:
            observer(_observed_step(denoiser))
    progress(denoiser.steps, denoiser.steps)
    return denoiser.latents()


def _observed_step(denoiser: Denoiser) -> StepState:
    step, sigma, latents = denoiser.steps_done, denoiser.sigma, denoiser.latents()
    denoiser.step()
    return StepState(
        step=step,
        sigma=sigma,
        latents=latents,
        velocity=denoiser.velocity(),
        negative_velocity=denoiser.negative_velocity(),
    )


def _upload(session: Session, feed: Feed) -> dict[str, Tensor]:
    return {name: session.upload(array) for name, array in feed.items()}


def _download(session: Session, tensor: Tensor) -> Array:
    """A copy of the content of ``tensor`` in the host's own memory."""
    return np.array(session.download(tensor), np.float32)
