"""The denoiser: a step as a unit, latents that are set from outside, and both velocities."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qie.engines.editing.conditioning import Conditioning, condition
from qie.engines.editing.denoise import Denoiser, StepState, denoise, upload_schedule
from qie.engines.editing.edit import row_of, start_noise
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.feeds import transformer_feed
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.schedule import sigmas

STEPS = 4
REQUEST = Request(
    images=[Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8))],
    instructions=["make it red"],
    seeds=[3, 4],
    steps=STEPS,
    guidance=4.0,
)


@pytest.fixture(scope="module")
def editor(bundle: Path) -> Iterator[Editor]:
    with Editor(bundle) as editor:
        yield editor


@pytest.fixture(scope="module")
def conditioning(editor: Editor) -> Conditioning:
    return condition(editor.stages, editor.tokenizer, REQUEST, resolve(REQUEST, editor.bundle.manifest))


@pytest.fixture(scope="module")
def noise(editor: Editor) -> np.ndarray:
    manifest = editor.bundle.manifest
    return start_noise(REQUEST, resolve(REQUEST, manifest), manifest)


@pytest.fixture(scope="module")
def states(editor: Editor) -> list[StepState]:
    """The steps of the edit."""
    states: list[StepState] = []
    editor.edit(REQUEST, observer=states.append)
    return states


def start(editor: Editor, conditioning: Conditioning, noise: np.ndarray, *, guided: bool = True) -> Denoiser:
    tokens = noise.shape[1]
    schedule = sigmas(editor.model.scheduler, steps=STEPS, noise_tokens=tokens)
    tables = modulation_tables(editor.bundle, schedule)
    with editor.stages.session("transformer") as session:
        settings = resolve(REQUEST, editor.bundle.manifest)
        rows = [row_of(conditioning, settings, noise, sample) for sample in range(len(noise))]
        return Denoiser.start(
            session,
            rows if guided else [replace(row, negative=None) for row in rows],
            schedule=upload_schedule(session, schedule, tables),
            rotary=editor.model.rotary,
            grids=conditioning.grids,
        )


def test_steps_are_those_of_the_edit(
    editor: Editor, conditioning: Conditioning, noise: np.ndarray, states: list[StepState]
) -> None:
    denoiser = start(editor, conditioning, noise)
    assert denoiser.steps == len(states) == STEPS
    for state in states:
        assert (denoiser.steps_done, denoiser.sigma) == (state.step, state.sigma)
        assert np.array_equal(denoiser.latents(), state.latents)
        denoiser.step()
        assert np.array_equal(denoiser.velocity(), state.velocity)
        assert np.array_equal(denoiser.negative_velocity(), state.negative_velocity)
    assert denoiser.steps_done == STEPS


def test_a_forced_step_is_that_of_its_latents(
    editor: Editor, conditioning: Conditioning, noise: np.ndarray, states: list[StepState]
) -> None:
    """Teacher forcing: other noise, and from step 2 on the latents of the edit."""
    denoiser = start(editor, conditioning, -noise)
    denoiser.step()
    denoiser.step()
    assert not np.array_equal(denoiser.latents(), states[2].latents)
    forced = states[2].latents.copy()
    denoiser.set_latents(forced)
    assert np.array_equal(denoiser.latents(), states[2].latents)
    denoiser.step()
    assert np.array_equal(denoiser.velocity(), states[2].velocity)
    assert np.array_equal(denoiser.negative_velocity(), states[2].negative_velocity)
    assert np.array_equal(denoiser.latents(), states[3].latents)
    assert np.array_equal(forced, states[2].latents)  # the caller's array is read, not written


def test_denoisers_take_turns(editor: Editor, conditioning: Conditioning, noise: np.ndarray) -> None:
    """A request joins at its own first step, and each gives what it gives alone."""
    alone = [denoise(start(editor, conditioning, sign * noise)) for sign in (1, -1)]
    first, second = start(editor, conditioning, noise), start(editor, conditioning, -noise)
    first.step()
    while second.steps_done < STEPS:
        if first.steps_done < STEPS:
            first.step()
        second.step()
    assert np.array_equal(first.latents(), alone[0])
    assert np.array_equal(second.latents(), alone[1])


def test_a_step_is_a_run_of_the_eleven_inputs(editor: Editor, conditioning: Conditioning, noise: np.ndarray) -> None:
    denoiser = start(editor, conditioning, noise, guided=False)
    denoiser.step()
    assert denoiser.negative_velocity() is None
    schedule = sigmas(editor.model.scheduler, steps=STEPS, noise_tokens=noise.shape[1])
    tables = modulation_tables(editor.bundle, schedule)
    feed = transformer_feed(
        latents_BNC=noise,
        reference_BRC=np.repeat(conditioning.reference, 2, axis=0),
        prompt_BLD=np.repeat(conditioning.prompts[0], 2, axis=0),
        rotary=editor.model.rotary,
        grids=conditioning.grids,
        modulation_YM=tables.blocks[0],
        modulation_out_O=tables.out[0],
        dsigma=schedule[1] - schedule[0],
    )
    (engine,) = [e for e in editor.bundle.manifest.engines if e.component == "transformer"]
    assert sorted(feed) == sorted(spec.name for spec in engine.inputs)
    with editor.stages.session("transformer") as session:
        outputs = {name: session.empty(name, {"batch": 2, "noise_tokens": noise.shape[1]}) for name in
                   ("velocity", "latents_next")}  # fmt: skip
        session.run({name: session.upload(array) for name, array in feed.items()}, outputs)
        assert np.array_equal(session.download(outputs["velocity"]), denoiser.velocity())
        assert np.array_equal(session.download(outputs["latents_next"]), denoiser.latents())


def test_a_skipped_step_runs_nothing(
    editor: Editor, conditioning: Conditioning, noise: np.ndarray, states: list[StepState]
) -> None:
    denoiser = start(editor, conditioning, noise)
    denoiser.skip()
    denoiser.skip()
    assert (denoiser.steps_done, denoiser.sigma) == (2, states[2].sigma)
    assert np.array_equal(denoiser.latents(), noise)
    with pytest.raises(AssertionError):
        denoiser.velocity()
    denoiser.set_latents(states[2].latents)
    denoiser.step()
    assert np.array_equal(denoiser.velocity(), states[2].velocity)
    assert np.array_equal(denoiser.latents(), states[3].latents)


def test_each_image_of_a_batch_may_be_at_a_step_of_its_own(
    editor: Editor, conditioning: Conditioning, noise: np.ndarray, states: list[StepState]
) -> None:
    """An image joins at its own first step, and its bits are those of the edit in which all are at one step."""
    settings = resolve(REQUEST, editor.bundle.manifest)
    schedule = sigmas(editor.model.scheduler, steps=STEPS, noise_tokens=noise.shape[1])
    rows = [
        replace(row_of(conditioning, settings, noise, 0), latents=states[2].latents[0], step=2),
        row_of(conditioning, settings, noise, 1),
    ]
    with editor.stages.session("transformer") as session:
        denoiser = Denoiser.start(
            session,
            rows,
            schedule=upload_schedule(session, schedule, modulation_tables(editor.bundle, schedule)),
            rotary=editor.model.rotary,
            grids=conditioning.grids,
        )
    assert denoiser.steps == STEPS - 2
    for done in range(1, 3):
        denoiser.step()
        latents = denoiser.latents()
        after = [
            states[n].latents if n < STEPS else denoise(start(editor, conditioning, noise)) for n in (2 + done, done)
        ]
        assert np.array_equal(latents[0], after[0][0])
        assert np.array_equal(latents[1], after[1][1])
    with pytest.raises(AssertionError):
        denoiser.step()
