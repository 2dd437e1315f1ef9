"""What the backend of the language model changes in an estimate."""

from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.planning.estimate import ComponentEstimate, Estimate, estimate
from qie.compiler.planning.plan import Plan
from tests.support.bundles import planned


@pytest.fixture
def tiny(checkpoint: Path, tmp_path: Path) -> Plan:
    return planned(checkpoint, tmp_path / "bundle")


def of(estimated: Estimate, component: str) -> ComponentEstimate:
    return next(c for c in estimated.components if c.component == component)


def test_an_engine_that_keeps_its_activations(tiny: Plan) -> None:
    """They come on top of what the other engines share."""
    plan = replace(tiny, recipe=replace(tiny.recipe, compute_capability="8.9", residency="resident"))
    language = next(p for p in plan.components if p.component == "language")
    others = tuple(replace(p, backend="tensorrt-rtx") for p in plan.components if p.component != "language")
    shared = estimate(replace(plan, components=(*others, replace(language, backend="tensorrt-rtx"))))
    own = estimate(replace(plan, components=(*others, replace(language, backend="tensorrt-llm"))))
    difference = own.gpu_bytes - shared.gpu_bytes
    weights = of(own, "language").weights_bytes - of(shared, "language").weights_bytes
    assert of(shared, "language").working_bytes < max(c.working_bytes for c in shared.components)
    assert difference - weights == of(own, "language").largest_activation_bytes
