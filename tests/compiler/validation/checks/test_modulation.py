"""The stored modulation tables against weights: of the bundle, or of the one that was built again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.packing.made_from import bundle_recipe
from qie.compiler.validation.checks.check import Finding, Outcome
from qie.compiler.validation.checks.registry import CHECKS
from qie.compiler.validation.modulation import table_differences
from qie.compiler.validation.subject import Executed, Subject
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import AddedSchedule
from qie.engines.sessions.choose import choose_engines


@pytest.fixture
def with_weights(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def alone(with_weights: Bundle) -> Bundle:
    """The same bundle as if it had tables alone."""
    manifest = with_weights.manifest
    modulation = replace(manifest.model.modulation, file=None, tensors=())
    return replace(with_weights, manifest=replace(manifest, model=replace(manifest.model, modulation=modulation)))


@pytest.fixture
def rebuilt(with_weights: Bundle) -> Iterator[Executed]:
    executed = Executed.of(with_weights, choose_engines(with_weights), on="CPU", rebuilt=True, device=None)
    yield executed
    executed.close()


def found(bundle: Bundle, executed: Executed | None = None) -> list[Outcome]:
    (spec,) = (check for check in CHECKS if (check.level, check.name) == ("components", "modulation"))
    return list(spec.run(Subject(bundle=bundle, recipe=bundle_recipe(bundle), executed=executed)))


def test_without_weights_it_is_not_run(alone: Bundle) -> None:
    (outcome,) = found(alone)
    assert isinstance(outcome, Finding)
    assert outcome.value is None
    assert outcome.detail.startswith("the bundle has no modulation weights to compare its tables with; ")


def test_the_weights_of_the_bundle_that_was_built_again(with_weights: Bundle, alone: Bundle, rebuilt: Executed) -> None:
    outcomes = [found(bundle, executed)[0] for bundle, executed in ((with_weights, None), (alone, rebuilt))]
    assert all(isinstance(outcome, Finding) and outcome.value is not None for outcome in outcomes)
    assert outcomes[0] == outcomes[1]
    modulation = replace(alone.manifest.model.modulation, digest="0" * 64)
    model = replace(alone.manifest.model, modulation=modulation)
    other = replace(alone, manifest=replace(alone.manifest, model=model))
    (outcome,) = found(other, rebuilt)
    assert isinstance(outcome, Finding)
    assert outcome.value is None


def test_an_added_schedule_is_explained(with_weights: Bundle) -> None:
    """A table of steps that the recipe does not have is one too many, unless it was added."""
    recipe = bundle_recipe(with_weights)
    assert table_differences(with_weights, recipe) == ([], [])
    fewer = replace(recipe, schedules=recipe.schedules[:2])
    missing, unexplained = table_differences(with_weights, fewer)
    assert (missing, len(unexplained)) == ([], 3)  # of 4 steps at three numbers of tokens
    added = AddedSchedule(steps=4, sizes=with_weights.manifest.limits.buckets)
    told = replace(with_weights, manifest=replace(with_weights.manifest, added=(added,)))
    assert table_differences(told, fewer) == ([], [])
