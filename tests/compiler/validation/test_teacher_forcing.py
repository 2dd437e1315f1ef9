"""Teacher forcing: the recorded steps of a case, each from its own latents, and no other step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed
from qie.compiler.validation.teacher_forcing import velocities
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.sessions.choose import choose_engines
from qie.engines.sessions.session import Session
from tests.support.golden_cases import own_case


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture(scope="module")
def executed(opened: Bundle) -> Iterator[Executed]:
    executed = Executed.of(opened, choose_engines(opened), on="onnxruntime", rebuilt=False, device=None)
    yield executed
    executed.close()


@pytest.fixture(scope="module")
def case(opened: Bundle) -> GoldenCase:
    return own_case(opened, recorded=(0, 2, 3))


def test_a_bundle_along_its_own_trajectory_is_exact(executed: Executed, case: GoldenCase) -> None:
    reports: list[tuple[int, int]] = []
    steps = velocities(executed, case, progress=lambda done, total: reports.append((done, total)))
    assert [step.step for step in steps] == [0, 2, 3]
    assert [step.sigma for step in steps] == [float(case.sigmas[k]) for k in (0, 2, 3)]
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for number, step in enumerate(steps):
        assert np.array_equal(step.velocity, case.velocity[number])
        assert np.array_equal(step.negative_velocity, case.negative_velocity[number])
        assert np.array_equal(step.latents_next, case.latents_next[number])


def test_every_step_starts_from_the_latents_of_the_case(executed: Executed, case: GoldenCase) -> None:
    """Other latents of one step change that step and not the ones after it."""
    latents = case.latents.copy()
    latents[1] = -latents[1]
    changed = GoldenCase(record=case.record, tensors={**case.tensors, "latents": latents})
    equal = [
        np.array_equal(step.velocity, expected)
        for step, expected in zip(velocities(executed, changed), case.velocity, strict=True)
    ]
    assert equal == [True, False, True]


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("prompt_embeds", {"velocity"}),
        ("negative_embeds", {"negative_velocity"}),
        ("reference_latents.0", {"velocity", "negative_velocity"}),
    ],
)
def test_embeds_and_reference_latents_are_those_of_the_case(
    executed: Executed, case: GoldenCase, name: str, passes: set[str]
) -> None:
    changed = GoldenCase(record=case.record, tensors={**case.tensors, name: case.tensors[name][::-1].copy()})
    step, *_ = velocities(executed, changed)
    for found in ("velocity", "negative_velocity"):
        assert np.array_equal(getattr(step, found), getattr(case, found)[0]) == (found not in passes)
    assert not np.array_equal(step.latents_next, case.latents_next[0])


def test_guidance_is_that_of_the_case(executed: Executed, case: GoldenCase) -> None:
    changed = GoldenCase(record=replace(case.record, guidance=2.0), tensors=case.tensors)
    step, *_ = velocities(executed, changed)
    assert np.array_equal(step.velocity, case.velocity[0])
    assert not np.array_equal(step.latents_next, case.latents_next[0])


def test_without_guidance_there_is_one_pass(executed: Executed, opened: Bundle) -> None:
    case = own_case(opened, recorded=(1,), guidance=1.0)
    (step,) = velocities(executed, case)
    assert step.negative_velocity is None
    assert np.array_equal(step.velocity, case.velocity[0])
    assert np.array_equal(step.latents_next, case.latents_next[0])


def test_steps_that_are_not_recorded_are_not_run(
    executed: Executed, case: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0
    original = executed.stages.session

    @contextmanager
    def counted(component: Any) -> Iterator[Session]:
        with original(component) as session:
            run = session.run

            def count(*tensors: Any) -> None:
                nonlocal runs
                runs += 1
                run(*tensors)

            monkeypatch.setattr(session, "run", count)
            yield session

    monkeypatch.setattr(executed.stages, "session", counted)
    velocities(executed, case)
    assert runs == 2 * len(case.record.recorded)
