"""Every engine on the GPU against onnxruntime in float32 on the CPU, on the tensors of a real edit."""

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from qie.compiler.metrics.error import relative_l2
from qie.compiler.selftest.recording import Run
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.errors import RequestError
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.session import Session
from qie.engines.sessions.tensorrt.session import TensorRtSession

BOUND = 0.03
"""Relative L2 distance of an engine in bfloat16 from float32; the recipes' gate for the published model is 0.02."""


@pytest.fixture(params=COMPONENTS)
def component(request: pytest.FixtureRequest) -> Component:
    component: Component = request.param
    return component


def open_session(bundle: Bundle, component: Component) -> Iterator[Session]:
    (record,) = [e for e in bundle.manifest.engines if e.component == component]
    device = open_device([record])
    session = load(bundle.path, record, device)
    yield session
    session.close()
    gc.collect()
    if device is not None:
        device.close()


@pytest.fixture
def session(on_gpu: Bundle, component: Component) -> Iterator[Session]:
    yield from open_session(on_gpu, component)


@pytest.fixture
def transformer(on_tensorrt: Bundle) -> Iterator[Session]:
    yield from open_session(on_tensorrt, "transformer")


def run_again(session: Session, run: Run) -> dict[str, np.ndarray]:
    """The outputs of ``session`` for the inputs of ``run``."""
    outputs = {name: session.upload(np.zeros_like(array)) for name, array in run.outputs.items()}
    session.run({name: session.upload(array) for name, array in run.inputs.items()}, outputs)
    return {name: np.array(session.download(tensor)) for name, tensor in outputs.items()}


def test_parity(
    session: Session, component: Component, runs_on_cpu: list[Run], measured: Callable[[str], None]
) -> None:
    runs = [run for run in runs_on_cpu if run.component == component]
    assert runs
    distances = []
    for run in runs:
        outputs = run_again(session, run)
        for name, expected in run.outputs.items():
            assert outputs[name].shape == expected.shape
            assert outputs[name].dtype == expected.dtype
            assert expected.std() > 0
            distances.append(relative_l2(outputs[name], expected))
    measured(", ".join(f"{distance:.4f}" for distance in distances))
    assert max(distances) < BOUND


def test_a_run_twice_gives_the_same_bytes(session: Session, component: Component, runs_on_cpu: list[Run]) -> None:
    run = next(run for run in runs_on_cpu if run.component == component)
    first, second = run_again(session, run), run_again(session, run)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_repeated_runs_are_captured_and_give_the_same_bytes(
    transformer: Session, on_tensorrt: Bundle, runs_on_cpu: list[Run]
) -> None:
    """The first run is a plain one, the second captures, the others replay."""
    assert isinstance(transformer, TensorRtSession)
    run = next(run for run in runs_on_cpu if run.component == "transformer")
    inputs = {name: transformer.upload(array) for name, array in run.inputs.items()}
    outputs = {name: transformer.upload(np.zeros_like(array)) for name, array in run.outputs.items()}
    results = []
    for _ in range(4):
        transformer.run(inputs, outputs)
        results.append(transformer.download(outputs["velocity"]))
    assert all(np.array_equal(results[0], later) for later in results[1:])
    by_tensorrt = on_tensorrt.manifest.engines[0].backend == "tensorrt-rtx"
    assert transformer.cuda_graphs == (0 if by_tensorrt else 1)  # TensorRT for RTX keeps its graphs to itself


def test_what_is_copied_in_reaches_a_captured_run(transformer: Session, runs_on_cpu: list[Run]) -> None:
    run = next(run for run in runs_on_cpu if run.component == "transformer")
    inputs = {name: transformer.upload(array) for name, array in run.inputs.items()}
    outputs = {name: transformer.upload(np.zeros_like(array)) for name, array in run.outputs.items()}
    for _ in range(3):
        transformer.run(inputs, outputs)
    other = transformer.upload(run.inputs["latents"] * np.float32(0.5))
    transformer.copy(other, inputs["latents"])
    transformer.run(inputs, outputs)
    captured = transformer.download(outputs["velocity"])
    plain = {**run.inputs, "latents": run.inputs["latents"] * np.float32(0.5)}
    alone = run_again(transformer, Run(component="transformer", inputs=plain, outputs=run.outputs))
    assert np.array_equal(captured, alone["velocity"])


def test_shapes_outside_the_profile_are_refused(transformer: Session, runs_on_cpu: list[Run]) -> None:
    run = next(run for run in runs_on_cpu if run.component == "transformer")
    inputs = {name: transformer.upload(array) for name, array in run.inputs.items()}
    inputs["latents"] = transformer.upload(np.zeros((1, 100_000, 64), np.float32))
    with pytest.raises(RequestError, match="latents of transformer is"):
        transformer.run(inputs, {name: transformer.upload(array) for name, array in run.outputs.items()})
