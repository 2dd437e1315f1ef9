"""The calibration that a build makes where its recipe quantizes and there is none, and its time, counted."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qie.compiler.checkpoint.model import Model
from qie.compiler.planning.calibration_memory import CalibrationMemory, calibration_memory
from qie.compiler.planning.cost import cost
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.workload import Workload, sizes_of
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.schema import Recipe, SchemeName
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.bundle.specs import Size
from qie.engines.inputs.sizes import calculate_dimensions
from qie.engines.machine import cores

__all__ = [
    "SAMPLES",
    "PlannedCalibration",
    "calibration_area",
    "calibration_model",
    "needed_schemes",
    "planned_calibration",
]

SAMPLES = 8
"""Forward passes that a build observes."""

AREA = 384 * 384
"""Pixels of the samples' images at most: a seventh of the published model's own area, and of the time. FP8 loses
nothing by it (docs/quantization.md)."""

SMOOTHED_AREA = 448 * 448
"""The same where the transformer is smoothed, which loses by smaller samples: 1.3 times the operations, and as large as
the calibration of the published 2511 stays within 3 GB of memory."""

FLOPS_PER_CORE = 50e9
"""Operations a second that a core does in float32, in all of a calibration: 2 cores of an AMD EPYC with AVX-512."""

_ONCE: tuple[Component, ...] = ("vision", "language", "vae_encoder", "transformer")
"""The components that a sample runs through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedCalibration:
    """A calibration to make.

    Attributes:
        samples: forward passes.
        size: of the samples' images, where they are square.
        flops: operations of all.
        cores: of this machine.
        memory: host memory of the component that takes most.
    """

    samples: int
    size: Size
    flops: int
    cores: int
    memory: CalibrationMemory

    @property
    def seconds(self) -> float:
        """An estimate for this machine: ``flops`` at ``FLOPS_PER_CORE``."""
        return self.flops / (FLOPS_PER_CORE * self.cores)


def planned_calibration(plan: Plan) -> PlannedCalibration | None:
    """What the build of ``plan`` measures; None where it needs no calibration or has one."""
    if plan.calibration is not None or not plan.recipe.quantizes:
        return None
    model = calibration_model(plan.model, calibration_area(plan.recipe.components.transformer.scheme))
    size = calculate_dimensions(model.areas.vae_area, 1)
    small = replace(plan, checkpoint=replace(plan.checkpoint, model=model))
    sizes: Mapping[Component, Mapping[str, int]] = sizes_of(
        small, Workload(size=size, references=1, steps=1, guidance=1)
    )
    graphs = {planned.component: planned.graph for planned in plan.components}
    costs = {component: cost(graphs[component], sizes[component], scores=True) for component in _ONCE}
    memories = [
        calibration_memory(graphs[component], counted, sizes[component], model, samples=SAMPLES)
        for component, counted in costs.items()
    ]
    return PlannedCalibration(
        samples=SAMPLES,
        size=size,
        flops=SAMPLES * sum(counted.flops() for counted in costs.values()),
        cores=cores(),
        memory=max(memories, key=lambda memory: memory.bytes),
    )


def calibration_area(scheme: SchemeName) -> int:
    """Pixels of the samples' images at most, where ``scheme`` is the transformer's."""
    smoothed = scheme in SCHEMES and "transformer" in SCHEMES[scheme].smoothed
    return SMOOTHED_AREA if smoothed else AREA


def calibration_model(model: Model, area: int) -> Model:
    """``model`` with images of at most ``area`` square pixels."""
    return replace(model, areas=replace(model.areas, vae_area=min(area, model.areas.vae_area)))


def needed_schemes(recipe: Recipe) -> dict[Component, tuple[SchemeName, ...]]:
    """The scheme of each component that ``recipe`` quantizes."""
    schemes = {component: recipe.components[component].scheme for component in COMPONENTS}
    return {component: (scheme,) for component, scheme in schemes.items() if scheme in SCHEMES}
