"""Bundles beside golden files, as checks get them, and what checks find."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from qie.compiler.recipe.gates import flat
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.validation.checks.check import NONE_ALLOWED, Finding, NotApplicable, judged
from qie.compiler.validation.checks.registry import CHECKS
from qie.compiler.validation.golden.file import Golden, GoldenCase, png
from qie.compiler.validation.report import CaseImages, Check, Gate, Measurement
from qie.compiler.validation.subject import Executed, Subject
from qie.engines.bundle.bundle import open_bundle
from qie.engines.sessions.choose import choose_engines

__all__ = ["ON", "checked", "only", "opened", "shown", "using", "with_images"]

ON = "onnxruntime, CPU"


@contextmanager
def opened(bundle: Path, golden: Golden | None) -> Iterator[Subject]:
    """A bundle for the CPU beside a golden file, with its engines."""
    found = open_bundle(bundle)
    recipe = parse_recipe(found.manifest.recipe.toml, bundle)
    executed = Executed.of(found, choose_engines(found), on=ON, rebuilt=False, device=None)
    yield Subject(bundle=found, recipe=recipe, golden=golden, executed=executed)
    executed.close()


def using(subject: Subject, golden: Golden | None) -> Subject:
    """The same loaded engines beside another golden file, with nothing of what they computed before."""
    executed = subject.executed
    assert executed is not None
    fresh = replace(executed, _results={})
    return replace(subject, golden=golden, no_golden="" if golden else "no golden file; record one", executed=fresh)


def only(golden: Golden, name: str, **record: object) -> Golden:
    """The golden file with one case alone, and other values of its record."""
    (case,) = (case for case in golden.cases if case.record.name == name)
    return replace(golden, cases=(replace(case, record=replace(case.record, **record)),))


def with_images(golden: Golden, change: Callable[[GoldenCase], Mapping[str, np.ndarray | Image.Image]]) -> Golden:
    """The golden file with other images in its cases, by the names of their tensors."""
    cases = [
        replace(case, tensors={**case.tensors, **{name: png(image) for name, image in change(case).items()}})
        for case in golden.cases
    ]
    return replace(golden, cases=tuple(cases))


def checked(subject: Subject, name: str) -> list[Check]:
    """What the check ``name`` of level edits finds, judged by the recipe of the bundle."""
    (spec,) = (spec for spec in CHECKS if (spec.level, spec.name) == ("edits", name))
    gate = NONE_ALLOWED
    if spec.gate is not None:
        gate = Gate(key=spec.gate, sense=spec.sense, bound=flat(subject.recipe.gates)[spec.gate])
    return [judged(spec, found, gate, 0.0) for found in spec.run(subject) if isinstance(found, Finding)]


def reasons(subject: Subject, name: str) -> list[str]:
    """Why the check ``name`` of level edits does not apply."""
    (spec,) = (spec for spec in CHECKS if (spec.level, spec.name) == ("edits", name))
    return [found.reason for found in spec.run(subject) if isinstance(found, NotApplicable)]


def shown(subject: Subject, name: str) -> list[Measurement | CaseImages]:
    """What the check ``name`` of level edits shows beside its findings."""
    (spec,) = (spec for spec in CHECKS if (spec.level, spec.name) == ("edits", name))
    return [outcome for outcome in spec.run(subject) if not isinstance(outcome, Finding)]
