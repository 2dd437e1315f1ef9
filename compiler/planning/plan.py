"""The plan of a build: what will be made from what, how large it is, and what can be kept from an earlier build.

A plan costs configs and graphs, no weights: it is what ``qie build --dry-run`` prints. A component's key is the
sha256 of all that decides its engine; an earlier bundle of the same name keeps an engine whose key is equal.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxscript
from numpy.typing import NDArray

import qie
from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.lora import Lora
from qie.compiler.checkpoint.model import Model
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.graphs.components import GRAPHS, graph_dtype, write_graph_of
from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.profiles import profiles
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import linear_inputs
from qie.compiler.quantization.qdq import quantize_by_recipe
from qie.compiler.quantization.smoothing import Group
from qie.compiler.recipe.schema import BackendName, Recipe
from qie.compiler.weights.modulation import modulation_dtype, modulation_weights
from qie.compiler.weights.stream import total_bytes
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, is_bundle
from qie.engines.bundle.manifest import Component, EngineRecord, ProfileRecord
from qie.engines.errors import BackendMissingError, BuildError, CalibrationError
from qie.engines.files import existing
from qie.engines.inputs.schedule import sigmas
from qie.engines.records import to_plain

__all__ = ["Plan", "PlannedComponent", "bundle_name", "check_buildable", "engine_key", "graph_keys", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedComponent:
    """One engine to be made of ``graph``; ``bytes`` are those of its weights.

    ``quantized`` linears of the ``linears`` that multiply by a weight are computed in the recipe's ``scheme``;
    ``smoothing_groups`` of them are smoothed by ``smoothing_scales``. ``attention`` is "fp8" where queries, keys and
    values are.

    ``backend`` is the one that this machine builds for, None where it can build for none of the recipe's. Where the
    recipe prefers one that must be built for on the GPU's machine, ``finish`` names it, and the graph stays in the
    bundle for ``qie build --finish``.
    """

    component: Component
    backend: BackendName | None
    finish: BackendName | None
    precision: str
    scheme: str
    attention: str
    graph: Graph
    nodes: int
    parameters: int
    bytes: int
    linears: int = 0
    quantized: int = 0
    smoothing_groups: tuple[Group, ...] = ()
    smoothing_scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def computes(self) -> str:
        """In which types, for people: "bfloat16, fp8"."""
        attention = f"{self.attention} attention" if self.attention != "none" else "none"
        return ", ".join([self.precision, *(said for said in (self.scheme, attention) if said != "none")])

    @property
    def kept_bytes(self) -> int:
        """What it takes in the bundle: the engine, and the graph where that stays beside it."""
        return self.bytes * (2 if self.backend is not None and self.finish is not None else 1)

    @property
    def passing_bytes(self) -> int:
        """What the graph takes while an engine is compiled of it, where it does not stay."""
        compiled = self.backend is not None and BACKENDS[self.backend].compiles
        return self.bytes if compiled and self.finish is None else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A build, resolved. ``table_steps`` are the rows of modulation that the recipe's schedules need.

    ``modulation_bytes`` supposes bfloat16, as published, where the checkpoint is configs alone.
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

    @property
    def model(self) -> Model:
        """What the configs of the checkpoint say."""
        return self.checkpoint.model

    @property
    def bytes(self) -> int:
        """Size of the bundle, to within the graphs and the tokenizer."""
        return sum(c.kept_bytes for c in self.components) + self.modulation_bytes + self.tables_bytes

    @property
    def disk_bytes(self) -> int:
        """The most that building takes on the disk."""
        return self.bytes + max(c.passing_bytes for c in self.components)


def make_plan(
    checkpoint: Checkpoint,
    *,
    recipe_name: str,
    recipe: Recipe,
    loras: Sequence[Lora],
    destination: Path,
    calibration: Calibration | None = None,
) -> Plan:
    """Plan the build of ``checkpoint`` by ``recipe`` into the folder ``destination``.

    Without ``calibration`` the plan of a recipe that quantizes can be counted, and not be carried out.

    Raises:
        CheckpointError, ExportError, RecipeError: configs or recipe cannot be expressed.
        CalibrationError: the calibration lacks a linear.
    """
    model = checkpoint.model
    config = model.transformer
    stored = modulation_dtype(checkpoint.reader("transformer")) if checkpoint.complete else "bfloat16"
    modulation = modulation_weights(config, stored)
    size = 4 if graph_dtype(recipe, "transformer") == "float32" else 2
    steps = sum(len(s) - 1 for s in recipe_schedules(model, recipe))
    return Plan(
        checkpoint=checkpoint,
        recipe_name=recipe_name,
        recipe=recipe,
        loras=tuple(loras),
        calibration=calibration,
        components=tuple(_planned(component, model, recipe, calibration) for component in GRAPHS),
        modulation_bytes=total_bytes(modulation),
        table_steps=steps,
        tables_bytes=steps * size * config.width * (config.layers * config.modulation_rows + 2),
        destination=destination,
    )


def recipe_schedules(model: Model, recipe: Recipe) -> list[NDArray[np.float32]]:
    """The distinct schedules (sigmas, float32 [S + 1]) of the recipe at the sizes that it names."""
    found = {}
    for schedule in model.schedules(recipe):
        for size in recipe.schedule_sizes(schedule, model.areas.vae_area):
            values = sigmas(model.scheduler, steps=schedule.steps, noise_tokens=size.tokens)
            found[values.tobytes()] = values
    return list(found.values())


def check_buildable(plan: Plan) -> None:
    """Refuse, before anything heavy, a plan that cannot be carried out here.

    Raises:
        BackendMissingError: no builder of this qie serves the recipe, or it is not installed.
        CalibrationError: a component is to be quantized, and there is no calibration.
        CheckpointError: parts do not belong together.
        BuildError: something that is no bundle is in the way, or the disk has not enough room.
    """
    for part in plan.components:
        if part.backend is None and part.finish is None:
            wanted = plan.recipe.backends_of(part.component)
            reasons = [BUILDERS[b].unavailable(plan.recipe) for b in wanted if b in BUILDERS]
            why = "; ".join(str(r) for r in reasons) or f"this qie builds for {', '.join(BUILDERS)}"
            raise BackendMissingError(
                f"the recipe {plan.recipe_name} builds {part.component} for {' or '.join(wanted)}: {why}. Or use "
                "the recipe cpu",
                option="gpu",
            )
        section = plan.recipe.components[part.component]
        asked = [scheme for scheme in (section.scheme, section.attention) if scheme != "none"]
        if asked and plan.calibration is None:
            raise CalibrationError(
                f'the recipe {plan.recipe_name} quantizes {part.component} ("{asked[0]}"), which needs a '
                "calibration of this model; make one with `qie calibrate`",
                option="calibration",
            )
    check_tokenizer(plan.checkpoint)
    path = plan.destination
    if path.exists() and not is_bundle(path) and not (path.is_dir() and not any(path.iterdir())):
        raise BuildError(f"{path} exists and is not a qie bundle; choose another folder or delete it", option="out")
    free = shutil.disk_usage(existing(plan.destination)).free
    if plan.disk_bytes > free:
        raise BuildError(
            f"building the bundle needs {plan.disk_bytes:,} bytes, {existing(plan.destination)} has {free:,} free; "
            "free some space or choose a folder on another disk",
            option="out",
        )


def graph_keys(plan: Plan, digest: str) -> dict[Component, str]:
    """What decides each component's graph and weights, as one sha256; ``digest`` is the checkpoint's."""
    loras = [[lora.digest(), lora.weight] for lora in plan.loras]
    versions = {"qie": qie.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    return {
        part.component: _sha256(
            {
                "graph": part.graph.digest(),
                "checkpoint": digest,
                "loras": loras if part.component == "transformer" else [],
                "section": [part.precision, part.scheme],
                "smoothing": {name: _sha256_of(values) for name, values in part.smoothing_scales.items()},
                "versions": versions,
            }
        )
        for part in plan.components
    }


def engine_key(graph: str, backend: str, recipe: Recipe, shapes: tuple[ProfileRecord, ...]) -> str:
    """What decides an engine, as one sha256: the key of its graph, its target and, on a GPU, its shapes and limits."""
    version = BUILDERS[backend].version()
    decided_by: dict[str, Any] = {"graph": graph, "target": [backend, recipe.compute_capability, version]}
    if recipe.compute_capability is not None:
        decided_by["shapes"] = to_plain(shapes)
        decided_by["limits"] = [recipe.memory_gib, recipe.limits.build_workspace_gib]
    return _sha256(decided_by)


def kept_engines(plan: Plan, graphs: Mapping[Component, str], old: Bundle | None) -> dict[Component, EngineRecord]:
    """The engines of an earlier bundle at the destination that are what this plan would make.

    ``graphs`` are the keys of the plan's graphs.
    """
    if old is None:
        return {}
    keys = {
        p.component: engine_key(graphs[p.component], p.backend, plan.recipe, profiles(p.graph, plan.recipe, plan.model))
        for p in plan.components
        if p.backend is not None
    }
    return {e.component: e for e in old.manifest.engines if keys.get(e.component) == e.key}


def bundle_name(checkpoint: Checkpoint, recipe_name: str) -> str:
    """The default name of a bundle: the checkpoint's last name and the recipe's."""
    stem = checkpoint.name.rsplit("/", 1)[-1]
    recipe = Path(recipe_name).stem.lower()
    return re.sub(r"[^a-z0-9.]+", "-", f"{stem}-{recipe}".lower()).strip("-.")


def _planned(component: Component, model: Model, recipe: Recipe, calibration: Calibration | None) -> PlannedComponent:
    section = recipe.components[component]
    plain = write_graph_of(component, model, recipe)
    quantized = quantize_by_recipe(plain, section, calibration, model.language)
    graph = quantized.graph
    known = [b for b in recipe.backends_of(component) if b in BUILDERS]
    backend = next((b for b in known if BUILDERS[b].unavailable(recipe) is None), None)
    elsewhere = bool(known) and backend != known[0] and BACKENDS[known[0]].builds_on_gpu
    return PlannedComponent(
        component=component,
        backend=backend,
        finish=known[0] if elsewhere else None,
        precision=section.precision,
        scheme=section.scheme,
        attention=section.attention,
        graph=graph,
        nodes=graph.model.graph.num_nodes(),
        parameters=graph.parameters(),
        bytes=total_bytes(graph.weights),
        linears=len(linear_inputs(plain)),
        quantized=len(quantized.linears),
        smoothing_groups=quantized.groups,
        smoothing_scales=quantized.smoothing_scales,
    )


def _sha256_of(values: NDArray[np.float32]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _sha256(decided_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
