"""What a build makes in one go: an engine and what it is made from, or several that share their files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.keys import engine_key, source_key
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.schema import BackendName
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import Component, ProfileRecord, stem

__all__ = ["Item", "Target", "items"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Target:
    """One part of a component.

    Attributes:
        planned: the component.
        number: of the part, from 0.
        graph: of the part.
        key: of the part's graph and weights.
        shapes: profiles of the part.
        engine: key of the engine; None where none is built here.
    """

    planned: PlannedComponent
    number: int
    graph: Graph
    key: str
    shapes: tuple[ProfileRecord, ...]
    engine: str | None

    @property
    def stem(self) -> str:
        """The beginning of the names of its files."""
        return stem(self.planned.component, self.number, len(self.planned.parts))

    def source_key(self, backend: BackendName) -> str:
        """The key of what the engine of ``backend`` is made from."""
        return source_key(self.key, BACKENDS[backend].source, self.shapes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """Targets that are made together; several only where they share one text encoder."""

    targets: tuple[Target, ...]

    @property
    def key(self) -> str:
        """sha256 of everything that decides its files."""
        facts = [
            [t.stem, t.engine, None if t.planned.finish is None else t.source_key(t.planned.finish)]
            for t in self.targets
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def items(plan: Plan, keys: Mapping[Component, tuple[str, ...]]) -> tuple[Item, ...]:
    """The items of ``plan`` in the order of its components and parts.

    Args:
        plan: of the build.
        keys: of the graphs (``graph_keys``).
    """
    found: list[Item] = []
    shared: list[Target] = []
    for planned in plan.components:
        for number, (graph, key) in enumerate(zip(planned.parts, keys[planned.component], strict=True)):
            target = _target(planned, number, graph, key, plan)
            if planned.in_text_encoder:
                shared.append(target)
            else:
                found.append(Item(targets=(target,)))
    return (*([Item(targets=tuple(shared))] if shared else []), *found)


def _target(planned: PlannedComponent, number: int, graph: Graph, key: str, plan: Plan) -> Target:
    shapes = profiles(graph, plan.recipe, plan.model)
    engine = None
    if planned.backend is not None:
        source = source_key(key, BACKENDS[planned.backend].source, shapes)
        engine = engine_key(source, planned.backend, plan.recipe, shapes)
    return Target(planned=planned, number=number, graph=graph, key=key, shapes=shapes, engine=engine)
