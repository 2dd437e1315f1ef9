"""The plan of a build: what will be made from what, how large it is, and what can be kept from an earlier build.

A plan costs configs and graphs, no weights: it is what ``qie build --dry-run`` prints. A component's key is the
sha256 of all that decides its engine; an earlier bundle of the same name keeps an engine whose key is equal.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxscript
from numpy.typing import NDArray

import qie
from qie.compiler.build import BUILDERS
from qie.compiler.checkpoint import Checkpoint
from qie.compiler.components import GRAPHS, graph_dtype, write_graph_of
from qie.compiler.configs import TransformerConfig
from qie.compiler.graphs.graph import Graph
from qie.compiler.lora import Lora
from qie.compiler.model import areas, check_parts, scheduler_spec
from qie.compiler.modulation import modulation_dtype, modulation_weights
from qie.compiler.recipe import Backend, Recipe
from qie.compiler.weights import total_bytes
from qie.engines.bundle import Bundle, is_bundle
from qie.engines.errors import BackendMissingError, BuildError, RecipeError
from qie.engines.manifest import Component, EngineRecord
from qie.engines.schedule import sigmas

__all__ = ["Plan", "PlannedComponent", "bundle_name", "check_buildable", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedComponent:
    """One engine to be made: its graph, its backend (None: no builder of this qie serves the recipe), its bytes."""

    component: Component
    backend: Backend | None
    precision: str
    quantization: str
    graph: Graph
    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A build, resolved. ``table_steps`` are the rows of modulation that the recipe's schedules need.

    ``modulation_bytes`` supposes bfloat16, as published, where the checkpoint is configs alone.
    """

    checkpoint: Checkpoint
    recipe_name: str
    recipe: Recipe
    loras: tuple[Lora, ...]
    components: tuple[PlannedComponent, ...]
    modulation_bytes: int
    table_steps: int
    tables_bytes: int
    destination: Path

    @property
    def bytes(self) -> int:
        """Size of the bundle, to within the graphs and the tokenizer."""
        return sum(c.bytes for c in self.components) + self.modulation_bytes + self.tables_bytes


def make_plan(
    checkpoint: Checkpoint, *, recipe_name: str, recipe: Recipe, loras: Sequence[Lora], destination: Path
) -> Plan:
    """Plan the build of ``checkpoint`` by ``recipe`` into the folder ``destination``.

    Raises:
        CheckpointError, ExportError, RecipeError: configs or recipe cannot be expressed.
    """
    config = TransformerConfig.from_config(checkpoint.transformer)
    stored = modulation_dtype(checkpoint.reader("transformer")) if checkpoint.complete else "bfloat16"
    modulation = modulation_weights(config, stored)
    size = 4 if graph_dtype(recipe, "transformer") == "float32" else 2
    steps = sum(len(s) - 1 for s in recipe_schedules(checkpoint, recipe))
    return Plan(
        checkpoint=checkpoint,
        recipe_name=recipe_name,
        recipe=recipe,
        loras=tuple(loras),
        components=tuple(_planned(component, checkpoint, recipe) for component in GRAPHS),
        modulation_bytes=total_bytes(modulation),
        table_steps=steps,
        tables_bytes=steps * size * config.width * (config.layers * config.modulation_rows + 2),
        destination=destination,
    )


def recipe_schedules(checkpoint: Checkpoint, recipe: Recipe) -> list[NDArray[np.float32]]:
    """The distinct schedules (sigmas, float32 [S + 1]) of the recipe at the sizes that it names."""
    spec, area = scheduler_spec(checkpoint), areas(checkpoint).vae_area
    found = {}
    for schedule in recipe.schedules:
        for size in recipe.schedule_sizes(schedule, area):
            values = sigmas(spec, steps=schedule.steps, noise_tokens=size.area // 256)
            found[values.tobytes()] = values
    return list(found.values())


def check_buildable(plan: Plan) -> None:
    """Refuse, before anything heavy, a plan that cannot be carried out here.

    Raises:
        BackendMissingError: no builder of this qie serves the recipe.
        RecipeError: a component asks for a quantization that this qie does not make, or a bucket is out of its limits.
        CheckpointError: parts do not belong together.
        BuildError: something that is no bundle is in the way, or the disk has not enough room.
    """
    for part in plan.components:
        if part.backend is None:
            wanted = " or ".join(plan.recipe.backends_of(part.component))
            raise BackendMissingError(
                f"the recipe {plan.recipe_name} builds {part.component} for {wanted}; this qie builds for "
                f"{', '.join(BUILDERS)}: use --gpu cpu, or --dry-run to see the plan alone"
            )
        if part.quantization != "none":
            raise RecipeError(
                f'components.{part.component}.quantization is "{part.quantization}", which this qie does not make '
                'yet; set it to "none" in a recipe of your own (see `qie recipes show`)'
            )
    check_parts(plan.checkpoint)
    plan.recipe.shape_limits(areas(plan.checkpoint).vae_area)
    path = plan.destination
    if path.exists() and not is_bundle(path) and not (path.is_dir() and not any(path.iterdir())):
        raise BuildError(f"{path} exists and is no bundle of qie's; name another folder with --out, or delete it")
    free = shutil.disk_usage(_existing(plan.destination)).free
    if plan.bytes > free:
        raise BuildError(
            f"the bundle needs {plan.bytes:,} bytes, {_existing(plan.destination)} has {free:,} free; make room, or "
            "choose another disk with --out"
        )


def component_keys(plan: Plan, digest: str) -> dict[Component, str]:
    """The cache key of every component; ``digest`` is the checkpoint's."""
    loras = [[lora.digest(), lora.weight] for lora in plan.loras]
    versions = {"qie": qie.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    keys: dict[Component, str] = {}
    for part in plan.components:
        assert part.backend is not None
        decided_by = {
            "graph": part.graph.digest(),
            "checkpoint": digest,
            "loras": loras if part.component == "transformer" else [],
            "section": [part.backend, part.precision, part.quantization, plan.recipe.compute_capability],
            "versions": versions | {part.backend: BUILDERS[part.backend].version()},
        }
        keys[part.component] = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
    return keys


def kept_engines(plan: Plan, keys: dict[Component, str], old: Bundle | None) -> dict[Component, EngineRecord]:
    """The engines of an earlier bundle at the destination that are what this plan would make."""
    if old is None:
        return {}
    return {e.component: e for e in old.manifest.engines if keys.get(e.component) == e.key}


def bundle_name(checkpoint: Checkpoint, recipe_name: str) -> str:
    """The default name of a bundle: the checkpoint's last name and the recipe's."""
    stem = checkpoint.name.rsplit("/", 1)[-1]
    recipe = Path(recipe_name).stem.lower()
    return re.sub(r"[^a-z0-9.-]+", "-", f"{stem}-{recipe}".lower()).strip("-.")


def _planned(component: Component, checkpoint: Checkpoint, recipe: Recipe) -> PlannedComponent:
    graph = write_graph_of(component, checkpoint, recipe)
    section = recipe.components[component]
    return PlannedComponent(
        component=component,
        backend=next((b for b in recipe.backends_of(component) if b in BUILDERS), None),
        precision=section.precision,
        quantization=section.quantization,
        graph=graph,
        nodes=graph.model.graph.num_nodes(),
        parameters=graph.parameters(),
        bytes=total_bytes(graph.weights),
    )


def _existing(path: Path) -> Path:
    """``path`` or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path
