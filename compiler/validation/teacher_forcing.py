"""The transformer along the reference's trajectory: every recorded step starts from the reference's latents.

Shape suffixes: N noise tokens, R reference tokens, L text tokens, D width of the prompt embeddings, C = 64 latent
channels of a token, S steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.host import grids_of
from qie.compiler.validation.subject import Executed
from qie.engines.editing.denoise import Denoiser, Row, upload_schedule
from qie.engines.editing.edit import table_dtype
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.session import Session

__all__ = ["StepVelocities", "forced", "velocities"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepVelocities:
    """What the transformer computes in one step from the reference's latents.

    Attributes:
        step: number of the step, from 0.
        sigma: of the step, in the bundle's own schedule.
        velocity: float32 [N, C], of the conditional pass, before guidance.
        negative_velocity: float32 [N, C], of the negative pass; None without guidance.
        latents_next: float32 [N, C], after the step.
    """

    step: int
    sigma: float
    velocity: Floats
    negative_velocity: Floats | None
    latents_next: Floats


def forced(executed: Executed, case: GoldenCase) -> list[StepVelocities]:
    """``velocities``, run once for each case."""
    return executed.once("velocities", case.record.name, lambda: velocities(executed, case))


def velocities(executed: Executed, case: GoldenCase, *, progress: StageProgress = no_progress) -> list[StepVelocities]:
    """Run the recorded steps of ``case``, each from the reference's latents, embeddings and reference latents.

    The schedule, its modulation and the rotary tables are the bundle's own. Steps that are not recorded are not run.

    Args:
        executed: the engines.
        case: of a golden file of the same model.
        progress: called with (steps run, steps recorded).

    Raises:
        RequestError: the prompt is too long for images of this size.
        BackendMissingError, BundleError: the engine cannot be loaded.
        EngineError: the backend failed or memory ran out.
    """
    with executed.stages.session("transformer") as session:
        denoiser = _start(executed, case, session)
        found = []
        for number, step in enumerate(case.record.recorded):
            progress(number, len(case.record.recorded))
            while denoiser.steps_done < step:
                denoiser.skip()
            denoiser.set_latents(case.latents[number][None])
            sigma = denoiser.sigma
            denoiser.step()
            negative_1NC = denoiser.negative_velocity()
            found.append(
                StepVelocities(
                    step=step,
                    sigma=sigma,
                    velocity=denoiser.velocity()[0],
                    negative_velocity=None if negative_1NC is None else negative_1NC[0],
                    latents_next=denoiser.latents()[0],
                )
            )
        progress(len(found), len(found))
    return found


def _start(executed: Executed, case: GoldenCase, session: Session) -> Denoiser:
    """The denoiser of ``case``, before its first step."""
    stages, model, record = executed.stages, executed.bundle.manifest.model, case.record
    noise_tokens, _ = case.noise.shape
    schedule_S = sigmas(model.scheduler, steps=record.steps, noise_tokens=noise_tokens)
    schedule = stages.schedule(schedule_S)
    if schedule is None:
        tables = modulation_tables(executed.bundle, schedule_S, dtype=table_dtype(stages.engines["transformer"]))
        schedule = upload_schedule(session, schedule_S, tables)
        stages.keep_schedule(schedule_S, schedule)
    row = Row(
        latents=case.noise,
        reference=np.concatenate(case.reference_latents),
        prompt=case.prompt_embeds,
        negative=case.negative_embeds,
        guidance=record.guidance,
    )
    return Denoiser.start(session, [row], schedule=schedule, rotary=model.rotary, grids=grids_of(case))
