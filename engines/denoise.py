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

from qie.engines.modulation import Tables
from qie.engines.sessions import Session, Tensor

__all__ = ["StepState", "denoise"]

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


class Rotary(Protocol):
    """Makes the rotary tables (cos, sin) of a prompt of so many text tokens."""

    def __call__(self, *, text_tokens: int) -> tuple[Array, Array]: ...


def denoise(
    session: Session,
    *,
    noise_BNC: Array,
    reference_1RC: Array,
    prompt_BLD: Array,
    negative_1LD: Array | None,
    rotary: Rotary,
    schedule: Array,
    tables: Tables,
    guidance: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    observer: Callable[[StepState], None] | None = None,
) -> Array:
    """Latents float32 [B, N, C] after the last step of ``schedule`` [S + 1].

    Everything is uploaded before the loop. In the loop the engine reads and writes tensors that are already in its
    memory: nothing is copied, allocated or brought to the host, unless there is an ``observer``.

    Raises:
        EditError: the backend failed.
    """
    batch, noise_tokens, _ = noise_BNC.shape
    sizes = {"batch": batch, "noise_tokens": noise_tokens}

    # 1. What stays the same in every step.
    shared = {"reference": session.upload(np.repeat(reference_1RC, batch, axis=0))}
    positive = shared | _text(session, prompt_BLD, rotary)
    zeros, one = session.upload(np.zeros_like(noise_BNC)), session.upload(np.ones(1, np.float32))
    guided = alone = {"negative_velocity": zeros, "guidance": one}
    negative = None
    if negative_1LD is not None:
        negative = shared | _text(session, np.repeat(negative_1LD, batch, axis=0), rotary)
        negative_velocity, unused = session.empty("velocity", sizes), session.empty("latents_next", sizes)
        scale = session.upload(np.full(1, guidance, np.float32))
        guided = {"negative_velocity": negative_velocity, "guidance": scale}

    # 2. What a step brings: modulation of its timestep, and how far it goes.
    moments = [
        {
            "modulation": session.upload(tables.blocks[s]),
            "modulation_out": session.upload(tables.out[s]),
            "dsigma": session.upload(schedule[s + 1 : s + 2] - schedule[s : s + 1]),
        }
        for s in range(len(schedule) - 1)
    ]

    # 3. The loop; latents and next latents change places.
    latents, following = session.upload(noise_BNC.copy()), session.empty("latents_next", sizes)
    velocity = session.empty("velocity", sizes)
    for s, moment in enumerate(moments):
        progress(s, len(moments))
        now = {"latents": latents, **moment}
        if negative is not None:
            session.run(negative | now | alone, {"velocity": negative_velocity, "latents_next": unused})
        session.run(positive | now | guided, {"velocity": velocity, "latents_next": following})
        if observer is not None:
            observer(
                StepState(
                    step=s,
                    sigma=float(schedule[s]),
                    latents=_copy(session, latents),
                    velocity=_copy(session, velocity),
                    negative_velocity=None if negative is None else _copy(session, negative_velocity),
                )
            )
        latents, following = following, latents
    progress(len(moments), len(moments))
    return _copy(session, latents)


def _text(session: Session, prompt_BLD: Array, rotary: Rotary) -> dict[str, Tensor]:
    """Prompt embeddings, and the rotary tables that belong to their length."""
    cos, sin = rotary(text_tokens=prompt_BLD.shape[1])
    arrays: dict[str, NDArray[Any]] = {"prompt_embeds": prompt_BLD, "rotary_cos": cos, "rotary_sin": sin}
    return {name: session.upload(array) for name, array in arrays.items()}


def _copy(session: Session, tensor: Tensor) -> Array:
    """The content of ``tensor``, free of the engine's memory."""
    return np.array(session.download(tensor), np.float32)
