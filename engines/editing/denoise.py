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
    guidance_scale,
    latents_feed,
    step_feed,
    text_feed,
)
from qie.engines.inputs.modulation import Tables
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.session import Session, Tensor

__all__ = ["Denoiser", "StepObserver", "StepState", "UploadedSchedule", "denoise", "upload_schedule"]

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
        step_inputs: the engine's inputs that belong to each step.
        bound: tensors that the engine reads at every step, into which ``step_inputs`` are copied; empty for a session
            that ``rebinds``, which reads ``step_inputs`` themselves.
    """

    sigmas: tuple[float, ...]
    step_inputs: tuple[dict[str, Tensor], ...]
    bound: dict[str, Tensor]


def upload_schedule(session: Session, schedule: Array, tables: Tables) -> UploadedSchedule:
    """Upload the steps of ``schedule`` [S + 1] with the modulation of each, once for all batches of an edit."""
    dsigma_S = np.diff(schedule)
    feeds = [step_feed(*step) for step in zip(tables.blocks, tables.out, dsigma_S, strict=True)]
    return UploadedSchedule(
        sigmas=tuple(float(sigma) for sigma in schedule[:-1]),
        step_inputs=tuple(_upload(session, feed) for feed in feeds),
        bound={} if session.rebinds else _upload(session, {name: array.copy() for name, array in feeds[0].items()}),
    )


class Denoiser:
    """The denoising of one batch of images of one size; its unit is a step.

    ``Denoiser.start`` uploads everything. ``step`` allocates nothing, copies nothing to the host and waits for nothing.
    A session that ``rebinds`` gets the inputs of a step as other tensors, and latents and next latents swap. Any other
    session gets the same tensors in every run, and new values are copied into them within its own memory.

    Attributes:
        shape: (B, N, C) of the latents.
        steps: steps of the schedule.
        steps_done: steps taken or skipped so far.
    """

    def __init__(
        self,
        session: Session,
        schedule: UploadedSchedule,
        *,
        shape: tuple[int, ...],
        inputs: dict[str, Tensor],
        negative_inputs: dict[str, Tensor] | None,
        outputs: dict[str, Tensor],
        negative_outputs: dict[str, Tensor] | None,
    ) -> None:
        """Use ``start``."""
        self._session, self._schedule = session, schedule
        self._inputs, self._outputs = inputs, outputs
        self._negative_inputs, self._negative_outputs = negative_inputs, negative_outputs
        self._latents, self._latents_next = inputs["latents"], outputs["latents_next"]
        self.shape = shape
        self.steps, self.steps_done = len(schedule.step_inputs), 0
        self._ran = False

    @classmethod
    def start(
        cls,
        session: Session,
        *,
        schedule: UploadedSchedule,
        noise_BNC: Array,
        reference_1RC: Array,
        prompt_BLD: Array,
        negative_1LD: Array | None = None,
        guidance: float = 1.0,
        rotary: RotarySpec,
        grids: Sequence[tuple[int, int]],
    ) -> "Denoiser":
        """Upload what the steps of a batch read.

        Args:
            session: of the transformer.
            schedule: from ``upload_schedule`` with the same session.
            noise_BNC: latents at the first sigma.
            reference_1RC: latents of the reference images, one after the other; the same for the whole batch.
            prompt_BLD: prompt embeddings, all of one length.
            negative_1LD: embeddings of the negative prompt; None for no guidance.
            guidance: scale of classifier-free guidance.
            rotary: constants of the model's rotary embedding.
            grids: (height, width) in tokens of the images being generated, then of each reference image.

        Raises:
            RequestError: a prompt is too long for images of this size.
            EngineError: the GPU is out of memory.
        """
        batch, noise_tokens, _ = noise_BNC.shape
        sizes = {"batch": batch, "noise_tokens": noise_tokens}

        # 1. What both passes read: latents, references, the inputs of the step.
        latents = latents_feed(noise_BNC.copy(), np.repeat(reference_1RC, batch, axis=0))
        shared = _upload(session, latents) | schedule.bound

        # 2. The conditional pass, unguided so far.
        unguided = _upload(session, guidance_feed(np.zeros_like(noise_BNC), 1.0))
        inputs = shared | _upload(session, text_feed(prompt_BLD, rotary, grids)) | unguided
        outputs = {name: session.empty(name, sizes) for name in ("velocity", "latents_next")}

        # 3. The negative pass runs first and unguided; its velocity then guides the conditional pass.
        negative_inputs = negative_outputs = None
        if negative_1LD is not None:
            negative_BLD = np.repeat(negative_1LD, batch, axis=0)
            negative_inputs = shared | _upload(session, text_feed(negative_BLD, rotary, grids)) | unguided
            negative_outputs = {name: session.empty(name, sizes) for name in ("velocity", "latents_next")}
            inputs |= guidance_inputs(negative_outputs["velocity"], session.upload(guidance_scale(guidance)))
        return cls(
            session,
            schedule,
            shape=noise_BNC.shape,
            inputs=inputs,
            negative_inputs=negative_inputs,
            outputs=outputs,
            negative_outputs=negative_outputs,
        )

    @property
    def sigma(self) -> float:
        """Sigma of the next step."""
        return self._schedule.sigmas[self.steps_done]

    def step(self) -> None:
        """Take one step of the schedule: the negative pass where there is guidance, then the conditional pass.

        Raises:
            EngineError: the backend failed.
        """
        assert self.steps_done < self.steps, "every step of the schedule was taken"
        session, step_inputs = self._session, self._schedule.step_inputs[self.steps_done]
        rebound = step_inputs | {"latents": self._latents} if session.rebinds else {}
        if not session.rebinds:
            for name, tensor in step_inputs.items():
                session.copy(tensor, self._schedule.bound[name])
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
