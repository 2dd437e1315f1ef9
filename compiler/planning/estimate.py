"""What the build of a plan needs and what an edit will cost, from configs alone and before anything heavy.

Everything is counted from the graphs (``qie.compiler.planning.cost``): time for one edit, memory for the largest edit
that the recipe allows. Time is a roof: what the GPU's datasheet promises, not what anyone measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.planning.cost import Cost, cost
from qie.compiler.planning.gpus import GPUS
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.workload import Workload, largest_sizes, sizes_of, workload
from qie.compiler.recipe.schema import BackendName
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import Component
from qie.engines.errors import BuildError, RecipeError
from qie.engines.inputs.feeds import STEP_INPUTS
from qie.engines.machine import GIB

__all__ = ["REACHABLE", "ComponentEstimate", "Estimate", "check_fit", "estimate", "refusal"]

REACHABLE = 0.6
"""The part of a card's peak for which a second time is given: an assumption to plan with, not a measurement."""

HOST_BASE = 200_000_000
"""Private memory of a building process beside its weights, measured with the ``host_factor`` of ``BACKENDS``."""

HOST_TENSORS = 2
"""Backends that compile nothing hold one tensor at a time and its copy: 0.40 GB was measured with onnxruntime for a
transformer whose largest tensor has 0.15 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentEstimate:
    """One engine of ``backend``, the one that is to run it.

    disk_bytes: the engine in the bundle, and its graph where that stays
    weights_bytes: on the card
    largest_activation_bytes: on the card, in the largest edit that the recipe allows
    largest_io_bytes: inputs and outputs on the card in that edit, those of all steps
    workspace_bytes: the most that the compiler's choices add on the card; TensorRT-RTX adds nothing, since what it
        calls workspace are the activations (1.7.1 reports both as one figure, whatever the limit)
    host_bytes: memory of the host while building
    runs: how often an edit runs it
    cost: one of these runs, at the sizes of the edit
    seconds: all of these runs at the card's peak; None where that is not known
    """

    component: Component
    backend: BackendName
    disk_bytes: int
    weights_bytes: int
    largest_activation_bytes: int
    largest_io_bytes: int
    workspace_bytes: int
    host_bytes: int
    runs: int
    cost: Cost
    seconds: float | None

    @property
    def working_bytes(self) -> int:
        """What it needs on the card beside its weights, while it runs."""
        return self.largest_activation_bytes + self.largest_io_bytes + self.workspace_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """All engines of ``plan`` and an edit with them."""

    plan: Plan
    workload: Workload
    components: tuple[ComponentEstimate, ...]

    @property
    def disk_bytes(self) -> int:
        """The bundle, to within the graphs and the tokenizer."""
        return sum(c.disk_bytes for c in self.components) + self.plan.modulation_bytes + self.plan.tables_bytes

    @property
    def card_bytes(self) -> int:
        """The most that the card holds: all weights and the largest working set, or the largest engine by itself."""
        if self.plan.recipe.residency == "sequential":
            return max(c.weights_bytes + c.working_bytes for c in self.components)
        return sum(c.weights_bytes for c in self.components) + max(c.working_bytes for c in self.components)

    @property
    def host_bytes(self) -> int:
        """The most host memory that building takes; engines are built one after the other."""
        return max(c.host_bytes for c in self.components)

    @property
    def flops(self) -> int:
        """Operations of the whole edit."""
        return sum(c.runs * c.cost.flops() for c in self.components)

    @property
    def seconds(self) -> float | None:
        """The whole edit at the card's peak; None where that is not known."""
        known = [c.seconds for c in self.components if c.seconds is not None]
        return sum(known) if len(known) == len(self.components) else None


def estimate(plan: Plan, work: Workload | None = None) -> Estimate:
    """Estimate ``plan`` and the edit ``work`` (None: the default one); takes seconds and a few hundred megabytes.

    Raises:
        RequestError: the images of ``work`` are too narrow.
    """
    work = workload(plan) if work is None else work
    sizes, largest = sizes_of(plan, work), largest_sizes(plan)
    steps = max(work.steps, *(schedule.steps for schedule in plan.model.schedules(plan.recipe)))
    runs: Mapping[Component, int] = {
        "vision": 1,
        "language": work.passes,
        "vae_encoder": work.references,
        "transformer": work.steps * work.passes,
        "vae_decoder": 1,
    }
    return Estimate(
        plan=plan,
        workload=work,
        components=tuple(
            _estimate(plan, part, sizes[part.component], largest[part.component], runs[part.component], steps)
            for part in plan.components
        ),
    )


def check_fit(plan: Plan) -> None:
    """Refuse a build that cannot fit, with the arithmetic.

    Raises:
        RecipeError, BuildError: see ``refusal``.
    """
    refused = refusal(estimate(plan))
    if refused is not None:
        raise refused


def refusal(found: Estimate) -> RecipeError | BuildError | None:
    """Why a build cannot fit, with the arithmetic; None where it can.

    RecipeError: the engines do not fit into the card. BuildError: building takes more host memory than it may.
    """
    recipe = found.plan.recipe
    if found.card_bytes > recipe.memory_gib * GIB:
        return RecipeError(_card_refusal(found))
    host = recipe.limits.host_memory_gib
    for part in found.components:
        if part.host_bytes > host * GIB:
            return BuildError(
                f"building {part.component} takes about {_gb(part.host_bytes)} of host memory, its weights being "
                f"{_gb(part.weights_bytes)}, and limits.host_memory_gib = {host:g} is "
                f"{_gb(host * GIB)}; raise it in a recipe of your own and build on a machine that has as much"
            )
    return None


def _card_refusal(found: Estimate) -> str:
    recipe = found.plan.recipe
    if recipe.residency == "resident":
        worst = max(found.components, key=lambda c: c.working_bytes)
        terms = [("all weights", sum(c.weights_bytes for c in found.components))]
        mend = 'set residency = "sequential" in the recipe'
    else:
        worst = max(found.components, key=lambda c: c.weights_bytes + c.working_bytes)
        terms = [(f"weights of {worst.component}", worst.weights_bytes)]
        mend = "choose a card with more memory"
    if terms[0][1] < recipe.memory_gib * GIB:
        workspace = "limits.build_workspace_gib, " if worst.workspace_bytes else ""
        mend += f", or lower {workspace}shapes.batch.max or shapes.references.max in the recipe"
    terms += [
        (f"activations of {worst.component}", worst.largest_activation_bytes),
        ("its inputs and outputs", worst.largest_io_bytes),
        ("workspace", worst.workspace_bytes),
    ]
    arithmetic = " + ".join(f"{what} {_gb(count)}" for what, count in terms if count >= 0.05e9)
    return (
        f"{found.plan.checkpoint.name} does not fit into the {recipe.gpu}: {arithmetic} = {_gb(found.card_bytes)}, "
        f"and memory_gib = {recipe.memory_gib:g} is {_gb(recipe.memory_gib * GIB)}; {mend}"
    )


def _estimate(
    plan: Plan, part: PlannedComponent, sizes: Mapping[str, int], largest: Mapping[str, int], runs: int, steps: int
) -> ComponentEstimate:
    builds = [backend for backend in (part.finish, part.backend) if backend is not None]
    backend = builds[0] if builds else plan.recipe.backends_of(part.component)[0]
    once, most = cost(part.graph, sizes), cost(part.graph, largest)
    peak_seconds = _seconds(once, plan.recipe.gpu)
    return ComponentEstimate(
        component=part.component,
        backend=backend,
        disk_bytes=part.kept_bytes if builds else part.bytes,
        weights_bytes=part.bytes,
        largest_activation_bytes=most.activation_bytes,
        largest_io_bytes=most.io_bytes + (steps - 1) * _step_bytes(part.graph),
        workspace_bytes=int(plan.recipe.limits.build_workspace_gib * GIB) if BACKENDS[backend].adds_workspace else 0,
        host_bytes=max(_host_bytes(part, backend) for backend in builds or [backend]),
        runs=runs,
        cost=once,
        seconds=None if peak_seconds is None else runs * peak_seconds,
    )


def _seconds(once: Cost, gpu: str) -> float | None:
    """The roof: one run takes as long as its operations at the card's peak, or its bytes, whichever is longer."""
    if gpu not in GPUS:
        return None
    peaks = GPUS[gpu]
    computing = sum(work.flops / (peaks.tflops[work.dtype] * 1e12) for work in once.work)
    return max(computing, once.moved_bytes / (peaks.bandwidth_gb_s * 1e9))


def _host_bytes(part: PlannedComponent, backend: BackendName) -> int:
    factor = BACKENDS[backend].host_factor
    if factor is not None:
        return HOST_BASE + int(factor * part.bytes)
    return HOST_BASE + HOST_TENSORS * max(_bytes(w.shape, w.dtype) for w in part.graph.weights)


def _step_bytes(graph: Graph) -> int:
    """Bytes of the inputs that every step has its own of; all their dims are fixed."""
    return sum(_bytes(spec.shape({}), spec.dtype) for spec in graph.inputs if spec.name in STEP_INPUTS)


def _bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].numpy().itemsize


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
