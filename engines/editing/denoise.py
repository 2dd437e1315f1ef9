"""The denoising loop: from noise to latents along a schedule, one or two passes of the transformer a step.

The pass is diffusers' ``pipelines/qwenimage/pipeline_qwenimage_edit_plus.py`` (__call__, 6. Denoising loop); guidance
and the Euler step are inside the engine.

Shape suffixes: B images of the batch, N noise tokens, R reference tokens, L text tokens, D width of the prompt
embeddings, C latent channels of a token, S steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qie.engines.inputs.modulation import Tables
from qie.engines.sessions.session import Session, Tensor

__all__ = ["Moments", "StepState", "denoise", "upload_moments"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepState:
    """One step as an observer sees it: its number and sigma, the latents before it, both velocities; [B, N, C] each.

    ``velocity`` is the conditional pass's own, before guidance; ``negative_velocity`` is None without guidance.
    """

    step: int
    sigma: float
    latents: Array
    velocity: Array
    negative_velocity: Array | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """The steps of a schedule in the engine's memory: the sigma of each, and what each brings to the engine.

    ``now`` are the tensors that the engine reads, every step is copied into them; none for a session that rebinds.
    """

    sigmas: tuple[float, ...]
    steps: tuple[dict[str, Tensor], ...]
    now: dict[str, Tensor]


class Rotary(Protocol):
    """Makes the rotary tables (cos, sin) of a prompt of so many text tokens."""

    def __call__(self, *, text_tokens: int) -> tuple[Array, Array]: ...


def upload_moments(session: Session, schedule: Array, tables: Tables) -> Moments:
    """The steps of ``schedule`` [S + 1] with the modulation of each, uploaded once for all batches of an edit."""
    steps = [
        {"modulation": tables.blocks[s], "modulation_out": tables.out[s], "dsigma": np.diff(schedule[s : s + 2])}
        for s in range(len(schedule) - 1)
    ]
    return Moments(
        sigmas=tuple(float(sigma) for sigma in schedule[:-1]),
        steps=tuple({name: session.upload(array) for name, array in step.items()} for step in steps),
        now={} if session.rebinds else {name: session.upload(array.copy()) for name, array in steps[0].items()},
    )


def denoise(
    session: Session,
    *,
    noise_BNC: Array,
    reference_1RC: Array,
    prompt_BLD: Array,
    negative_1LD: Array | None,
    rotary: Rotary,
    moments: Moments,
    guidance: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    observer: Callable[[StepState], None] | None = None,
) -> Array:
    """Latents float32 [B, N, C] after the last step of ``moments``.

    Everything is uploaded before the loop. In the loop nothing is allocated or brought to the host, and nothing waits
    for the result of a step, unless there is an ``observer``. A session that ``rebinds`` is given what a step brings as
    other inputs, and latents and next latents change places: nothing is copied. Any other one is given the same
    tensors in every run, and what is new is copied into them within its own memory.

    Raises:
        EditError: the backend failed.
    """
    batch, noise_tokens, _ = noise_BNC.shape
    sizes = {"batch": batch, "noise_tokens": noise_tokens}

    # 1. What both passes read: the latents, what the step brings, the references.
    latents, following = session.upload(noise_BNC.copy()), session.empty("latents_next", sizes)
    reference = session.upload(np.repeat(reference_1RC, batch, axis=0))
    shared = {"latents": latents, **moments.now, "reference": reference}

    # 2. The passes. The negative one runs first and alone; its velocity then guides the other.
    zeros, one = session.upload(np.zeros_like(noise_BNC)), session.upload(np.ones(1, np.float32))
    alone = {"negative_velocity": zeros, "guidance": one}
    positive = shared | _text(session, prompt_BLD, rotary) | alone
    velocity = session.empty("velocity", sizes)
    negative_velocity = None
    if negative_1LD is not None:
        negative = shared | _text(session, np.repeat(negative_1LD, batch, axis=0), rotary) | alone
        negative_velocity, unused = session.empty("velocity", sizes), session.empty("latents_next", sizes)
        positive |= {
            "negative_velocity": negative_velocity,
            "guidance": session.upload(np.full(1, guidance, np.float32)),
        }

    # 3. The loop.
    for step, brought in enumerate(moments.steps):
        progress(step, len(moments.steps))
        now = brought | {"latents": latents} if session.rebinds else {}
        if not session.rebinds:
            for name, tensor in brought.items():
                session.copy(tensor, moments.now[name])
        if negative_velocity is not None:
            session.run(negative | now, {"velocity": negative_velocity, "latents_next": unused})
        session.run(positive | now, {"velocity": velocity, "latents_next": following})
        if observer is not None:
            observer(
                StepState(
                    step=step,
                    sigma=moments.sigmas[step],
                    latents=_copy(session, latents),
                    velocity=_copy(session, velocity),
                    negative_velocity=None if negative_velocity is None else _copy(session, negative_velocity),
                )
            )
        if session.rebinds:
            latents, following = following, latents
        else:
            session.copy(following, latents)
    progress(len(moments.steps), len(moments.steps))
    return _copy(session, latents)


def _text(session: Session, prompt_BLD: Array, rotary: Rotary) -> dict[str, Tensor]:
    """Prompt embeddings, and the rotary tables that belong to their length."""
    cos, sin = rotary(text_tokens=prompt_BLD.shape[1])
    arrays: dict[str, NDArray[Any]] = {"prompt_embeds": prompt_BLD, "rotary_cos": cos, "rotary_sin": sin}
    return {name: session.upload(array) for name, array in arrays.items()}


def _copy(session: Session, tensor: Tensor) -> Array:
    """The content of ``tensor``, free of the engine's memory."""
    return np.array(session.download(tensor), np.float32)
