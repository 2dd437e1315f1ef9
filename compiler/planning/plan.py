"""The plan of a build: what is built from what, and how large it is.

A plan takes configs and graphs, no weights: it is what ``qie build --dry-run`` prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qie.compiler.backends import BUILDERS
from qie.compiler.backends.tensorrt_llm.tensors import whole_groups
from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.distilled import CHECKPOINT, distilled_model, find_schedule
from qie.compiler.checkpoint.lora import Lora, fused_reader
from qie.compiler.checkpoint.model import Model
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import SUBFOLDERS, Subfolder
from qie.compiler.checkpoint.tokenizer import tokenizer_files
from qie.compiler.checkpoint.unread import check_unread
from qie.compiler.graphs.components import GRAPHS, graph_dtype, write_graph_of
from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.parts import divided, host_memory
from qie.compiler.planning.sources import source_bytes
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import linear_inputs
from qie.compiler.quantization.qdq import quantize_by_recipe
from qie.compiler.quantization.smoothing import Group
from qie.compiler.recipe.schema import BackendName, Recipe
from qie.compiler.weights.modulation import modulation_bytes, modulation_weights
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import Component
from qie.engines.errors import CheckpointError
from qie.engines.inputs.schedule import sigmas

__all__ = ["Plan", "PlannedComponent", "make_plan", "recipe_schedules"]


NODE_BYTES = 800
"""More than a node and its weights have in a graph's file: 700 bytes where names are longest."""

MANIFEST_BYTES = 200_000
"""More than a manifest has, with the recipe in it."""

LORA_WEIGHT_USUAL = 10
"""Weights of LoRAs beyond this are worth a note."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedComponent:
    """One component to build, as one engine or as one for each part.

    Attributes:
        component: what it computes.
        backend: the first backend of the recipe that this machine builds for; None where it builds for none.
        finish: a backend that the recipe prefers and that only the machine with the GPU builds for; the graph stays in
            the bundle for it. None where there is no such backend.
        precision: dtype of activations and of weights that are not quantized.
        scheme: quantization scheme of the linears; "none" where they are not quantized.
        attention: "fp8" where queries, keys and values are quantized, else "none".
        graph: with Q/DQ nodes where it is quantized.
        parts: the graph as consecutive graphs, for an engine each; only the graph itself where it is not divided.
        nodes: of the graph.
        parameters: numbers in its weights.
        bytes: size of what the engine of ``backend`` is made from: its weights.
        finish_bytes: size of what the engine of ``finish`` is made from; 0 where there is none.
        linears: products with a weight.
        quantized: how many of these are quantized.
        amax: largest magnitude of the input of each quantized linear, after smoothing.
        smoothing_groups: linears that are smoothed together.
        smoothing_scales: of each group.
    """

    component: Component
    backend: BackendName | None
    finish: BackendName | None
    precision: str
    scheme: str
    attention: str
    graph: Graph
    parts: tuple[Graph, ...]
    nodes: int
    parameters: int
    bytes: int
    finish_bytes: int = 0
    linears: int = 0
    quantized: int = 0
    amax: Mapping[str, float] = field(default_factory=dict)
    smoothing_groups: tuple[Group, ...] = ()
    smoothing_scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def computes(self) -> str:
        """Precision and schemes, for people: ``bfloat16, fp8``."""
        attention = f"{self.attention} attention" if self.attention != "none" else "none"
        return ", ".join([self.precision, *(scheme for scheme in (self.scheme, attention) if scheme != "none")])

    @property
    def in_text_encoder(self) -> bool:
        """Whether its engine is made from a text encoder as transformers stores it, as others of the plan may be."""
        return self.backend is not None and BACKENDS[self.backend].source == "transformers"

    @property
    def bundle_bytes(self) -> int:
        """Size in the bundle: the engine, and what stays for ``qie build --finish``."""
        if self.finish is None:
            return self.bytes
        return self.finish_bytes + (self.bytes if self.backend is not None else 0)

    @property
    def transient_bytes(self) -> int:
        """Size of the largest graph that is deleted when its engine is compiled."""
        if self.backend is None or not BACKENDS[self.backend].compiles:
            return 0
        stays = self.finish is not None and BACKENDS[self.finish].source == BACKENDS[self.backend].source
        if stays:
            return 0
        parts = self.parts_for(self.backend)
        return self.bytes if len(parts) == 1 else max(total_bytes(part.weights) for part in parts)

    def parts_for(self, backend: BackendName) -> tuple[Graph, ...]:
        """The graphs of the engines of ``backend``: the parts where it builds from graphs, else the whole."""
        return self.parts if BACKENDS[backend].source == "graph" else (self.graph,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A build, resolved.

    Attributes:
        checkpoint: the model, its weights not necessarily downloaded.
        recipe_name: name or path that the caller gave.
        recipe: with everything that it inherits.
        loras: fused into the weights, in this order.
        calibration: statistics for the components that are quantized.
        components: in the order in which an edit uses them.
        modulation_bytes: size of the modulation weights in the bundle, 0 where it has tables alone; as bfloat16, as
            published, where no weights are here yet.
        table_steps: rows of modulation tables that the recipe's schedules need.
        tables_bytes: size of these tables.
        schedule: name of the schedule of its edits (``qie.compiler.checkpoint.distilled``).
        allow_unread: whether tensors that nothing reads are accepted.
        destination: folder of the bundle.
        memory: bytes of host memory that the build may use.
        device: CUDA index of the GPU to build on, for a backend that builds on one; None for the first that fits.
    """

    checkpoint: Checkpoint
    recipe_name: str
    recipe: Recipe
    loras: tuple[Lora, ...]
    calibration: Calibration | None
    components: tuple[PlannedComponent, ...]
    modulation_bytes: int
    table_steps: int
    tables_bytes: int
    destination: Path
    memory: int
    schedule: str = CHECKPOINT
    allow_unread: bool = False
    device: int | None = None

    @property
    def model(self) -> Model:
        """What the configs of the checkpoint say."""
        return self.checkpoint.model

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before the build."""
        notes = [
            f"the weight of {lora.name} is {lora.weight:g}: LoRAs are made for weights near 1, and a result that is no "
            "number is refused"
            for lora in self.loras
            if abs(lora.weight) > LORA_WEIGHT_USUAL
        ]
        for planned in self.components:
            left_out = len(planned.amax) - len(whole_groups(planned.amax))
            if left_out and "tensorrt-llm" in (planned.backend, planned.finish):
                notes.append(
                    f"TensorRT-LLM quantizes {len(planned.amax) - left_out} linears of {planned.component} and not "
                    f"{len(planned.amax)}, because the others are executed together with excluded ones"
                )
        return tuple(notes)

    @property
    def read(self) -> dict[Subfolder, set[str]]:
        """Names of the checkpoint's tensors that the build reads, by subfolder."""
        return _read_names(self.components, self.model)

    @property
    def bytes(self) -> int:
        """Size of the bundle, without graphs and tokenizer."""
        return sum(c.bundle_bytes for c in self.components) + self.modulation_bytes + self.tables_bytes

    @property
    def disk_bytes(self) -> int:
        """Peak use of the disk during the build."""
        return self.bytes + self.small_bytes + max(c.transient_bytes for c in self.components)

    @property
    def small_bytes(self) -> int:
        """Size of graphs, tokenizer, calibration and manifest."""
        graphs = NODE_BYTES * sum(c.nodes for c in self.components)
        calibration = self.calibration.source if self.calibration is not None and self.recipe.quantizes else None
        files = [calibration, *tokenizer_files(self.checkpoint.path)]
        others = sum(file.stat().st_size for file in files if file is not None and file.is_file())
        return graphs + others + MANIFEST_BYTES


def make_plan(
    checkpoint: Checkpoint,
    *,
    recipe_name: str,
    recipe: Recipe,
    loras: Sequence[Lora],
    destination: Path,
    calibration: Calibration | None = None,
    schedule: str | None = None,
    allow_unread: bool = False,
    device: int | None = None,
    memory_gib: float | None = None,
    memory: int | None = None,
) -> Plan:
    """Plan the build of ``checkpoint`` by ``recipe`` into the folder ``destination``.

    Without ``calibration``, a recipe that quantizes can be planned but not built.

    Args:
        checkpoint: the model.
        recipe_name: name or path of the recipe.
        recipe: the resolved recipe.
        loras: to fuse, in this order.
        destination: folder of the bundle.
        calibration: statistics of the quantized linears.
        schedule: see ``find_schedule``.
        allow_unread: accept tensors that nothing reads.
        device: see ``Plan``.
        memory_gib: host memory that the build may use; see ``host_memory``.
        memory: the same in bytes, of a plan that is made again.

    Raises:
        CheckpointError: the weights that are here do not belong to the configs, a LoRA does not belong to the model,
            or nothing reads some tensors.
        ExportError, RecipeError: the graphs do not express the configs or the recipe.
        CalibrationError: the calibration lacks a linear.
        BuildError: no build can have that much memory.
    """
    memory = host_memory(recipe, memory_gib) if memory is None else memory
    checkpoint.check_layers()
    schedule = find_schedule(schedule, loras)
    checkpoint = replace(checkpoint, model=distilled_model(checkpoint.model, schedule))
    model = checkpoint.model
    config = model.transformer
    readers = _readers(checkpoint)
    transformer = None if readers is None else fused_reader(readers["transformer"], loras)
    modulation = modulation_weights(config, transformer)
    components = tuple(_planned(component, model, recipe, calibration, device, memory) for component in GRAPHS)
    if readers is not None and not allow_unread:
        check_unread(readers, _read_names(components, model), model)
    size = 4 if graph_dtype(recipe, "transformer") == "float32" else 2
    steps = sum(len(s) - 1 for s in recipe_schedules(model, recipe))
    return Plan(
        checkpoint=checkpoint,
        recipe_name=recipe_name,
        recipe=recipe,
        loras=tuple(loras),
        calibration=calibration,
        components=components,
        modulation_bytes=modulation_bytes(modulation) if recipe.modulation == "weights" else 0,
        table_steps=steps,
        tables_bytes=steps * size * config.width * (config.layers * config.modulation_rows + 2),
        destination=destination,
        memory=memory,
        schedule=schedule,
        allow_unread=allow_unread,
        device=device,
    )


def recipe_schedules(model: Model, recipe: Recipe) -> list[NDArray[np.float32]]:
    """The distinct schedules (sigmas, float32 [S + 1]) of the recipe at the sizes that it names."""
    distinct = {}
    for schedule in model.schedules(recipe):
        for size in recipe.schedule_sizes(schedule, model.areas.vae_area):
            values = sigmas(model.scheduler, steps=schedule.steps, noise_tokens=size.tokens)
            distinct[values.tobytes()] = values
    return list(distinct.values())


def _readers(checkpoint: Checkpoint) -> dict[Subfolder, TensorReader] | None:
    try:
        return checkpoint.readers()
    except CheckpointError:  # no weights here yet, or damaged ones, which the build rejects
        return None


def _read_names(components: Sequence[PlannedComponent], model: Model) -> dict[Subfolder, set[str]]:
    names: dict[Subfolder, set[str]] = {subfolder: set() for subfolder in SUBFOLDERS}
    for planned in components:
        for weight in planned.graph.weights:
            names[weight.subfolder].add(weight.source)
    names["transformer"] |= {weight.source for weight in modulation_weights(model.transformer, None)}
    return names


def _planned(
    component: Component,
    model: Model,
    recipe: Recipe,
    calibration: Calibration | None,
    device: int | None,
    memory: int,
) -> PlannedComponent:
    section = recipe.components[component]
    plain = write_graph_of(component, model, recipe)
    quantized = quantize_by_recipe(plain, section, calibration, model.language)
    graph = quantized.graph
    backends = [b for b in recipe.backends_of(component) if b in BUILDERS]
    backend = next((b for b in backends if BUILDERS[b].unavailable(recipe, device) is None), None)
    elsewhere = bool(backends) and backend != backends[0] and BACKENDS[backends[0]].builds_on_gpu
    finish = backends[0] if elsewhere else None

    first = backend or finish or recipe.backends_of(component)[0]
    parts = divided(graph, recipe, [name for name in (backend or first, finish) if name is not None], memory)

    def sized(name: BackendName) -> int:
        if BACKENDS[name].source == "graph":
            return sum(total_bytes(part.weights) for part in parts)
        return source_bytes(BACKENDS[name].source, graph, quantized.amax, model, recipe)

    return PlannedComponent(
        component=component,
        backend=backend,
        finish=finish,
        precision=section.precision,
        scheme=section.scheme,
        attention=section.attention,
        graph=graph,
        parts=parts,
        nodes=graph.model.graph.num_nodes(),
        parameters=graph.parameters(),
        bytes=sized(first),
        finish_bytes=0 if finish is None else sized(finish),
        linears=len(linear_inputs(plain)),
        quantized=len(quantized.linears),
        amax=quantized.amax,
        smoothing_groups=quantized.groups,
        smoothing_scales=quantized.smoothing_scales,
    )
