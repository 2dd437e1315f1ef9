"""The ranking of linears: each alone is what it is in the whole model, and what is kept meets the budget."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.metrics.error import pooled_relative_l2
from qie.compiler.quantization.blockwise import Values, run
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import linears
from qie.compiler.quantization.qdq import quantize_linears
from qie.compiler.quantization.samples import CalibrationSample, component_values
from qie.compiler.quantization.sensitivity import RESULTS, Sensitivity, choose, sensitivity
from qie.compiler.quantization.smoothing import smoothed_modulation, smoothed_reader


def quiet(what: str, done: int, total: int) -> None:
    pass


Inputs = Callable[[Any], list[Values]]
Rank = Callable[..., Sensitivity]


@pytest.fixture(scope="module")
def inputs(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], samples: tuple[CalibrationSample, ...]
) -> Inputs:
    """What a component reads of two samples."""
    return cache(lambda component: component_values(component, tiny_checkpoint, readers, samples[:2], quiet))


@pytest.fixture(scope="module")
def rank(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], inputs: Inputs, calibration: Calibration
) -> Rank:
    """``sensitivity`` of a component over these."""
    return lambda component, scheme, **settings: sensitivity(
        tiny_checkpoint, readers, inputs(component), calibration, component=component, scheme=scheme, **settings
    )


def test_choosing_what_to_exclude() -> None:
    """Most squared error a byte first, and no more than it takes."""
    errors, sizes = {"a": 0.03, "b": 0.02, "c": 0.04, "d": 0.001}, {"a": 1, "b": 1, "c": 10, "d": 1}
    assert choose(errors, sizes, 1.0) == ()
    assert choose(errors, sizes, 0.046) == ("a",)
    assert choose(errors, sizes, 0.0405) == ("a", "b")
    assert choose(errors, sizes, 0.0) == ("a", "b", "c", "d")


@pytest.mark.parametrize(("component", "scheme"), [("transformer", "fp8"), ("language", "w4a16")])
def test_sensitivity(rank: Rank, component: Any, scheme: Any) -> None:
    """The excluded linears meet the budget, and an empty one does not."""
    whole = rank(component, scheme, budget=1.0)
    assert whole.exclude == ()
    assert whole.error_after_exclusion == whole.all_quantized_error > max(whole.errors.values())
    tight = rank(component, scheme, budget=0.5 * whole.all_quantized_error)
    assert 0 < tight.error_after_exclusion <= tight.budget
    assert 0 < len(tight.exclude) < len(tight.errors)
    assert tight.errors == whole.errors


@pytest.mark.parametrize(
    ("component", "scheme"),
    [pytest.param("transformer", "int8-smooth", marks=pytest.mark.soak), ("language", "int8-smooth")],
)
def test_each_linear_alone(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    calibration: Calibration,
    inputs: Inputs,
    rank: Rank,
    component: Any,
    scheme: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error is that of the whole model with it alone quantized, in one walk along the blocks or in many."""
    some = linears(GRAPHS[component](tiny_checkpoint.model, "float32"))[::3]
    results = {}
    for name in ("", *some):
        graph, through = GRAPHS[component](tiny_checkpoint.model, "float32"), dict(readers)
        own = [dict(sample) for sample in inputs(component)]
        if name:
            made = quantize_linears(graph, scheme, [name], calibration, tiny_checkpoint.model.language)
            graph = made.graph
            through[graph.subfolder] = smoothed_reader(readers[graph.subfolder], made.groups, made.smoothing_scales)
            for sample in own:
                if component == "transformer":
                    sample["modulation"] = smoothed_modulation(sample["modulation"], made.groups, made.smoothing_scales)
        run(graph, through, own, quiet)
        results[name] = [sample[RESULTS[component]] for sample in own]

    seen: list[tuple[int, int]] = []
    walks = []
    for limit in (2**40, 0, 200_000):
        monkeypatch.setattr("qie.compiler.quantization.sensitivity.CARRIED_BYTES", limit)
        seen.clear()
        ranked = rank(component, scheme, budget=1.0, progress=lambda _, done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]
        walks.append(len(seen))
        assert list(ranked.errors) == list(linears(GRAPHS[component](tiny_checkpoint.model, "float32")))
        for name in some:
            assert ranked.errors[name] == pytest.approx(pooled_relative_l2(results[name], results[""]), rel=1e-3)
    assert walks[0] < walks[2] < walks[1]
