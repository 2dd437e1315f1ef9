"""What a build makes in one go: an engine and what it is made from, or several that share their files."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.keys import engine_key, source_key, whole_key
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.schema import BackendName
from qie.engines.backends import BACKENDS, Source
from qie.engines.bundle.manifest import Component, ProfileRecord, stem
from qie.engines.records import to_plain

__all__ = ["Item", "Target", "items"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Target:
    """What one engine is made from, and the backends that make one of it.

    Attributes:
        planned: the component.
        number: of the part, from 0.
        graph: of the part, or of the component where its source is no graph.
        source: what an engine is made from.
        key: of that.
        shapes: profiles.
        finish: a backend for which it stays in the bundle.
        backend: the backend that makes an engine here.
        engine: key of that engine.
        stem: the beginning of the names of its files.
    """

    planned: PlannedComponent
    number: int
    graph: Graph
    source: Source
    key: str
    shapes: tuple[ProfileRecord, ...]
    finish: BackendName | None
    backend: BackendName | None
    engine: str | None
    stem: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """Targets that are made together; several only where they share one text encoder."""

    targets: tuple[Target, ...]

    @property
    def key(self) -> str:
        """sha256 of everything that decides its files."""
        facts = [[t.stem, t.engine, t.finish, t.key, to_plain(t.shapes)] for t in self.targets]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def items(plan: Plan, keys: Mapping[Component, tuple[str, ...]]) -> tuple[Item, ...]:
    """The items of ``plan`` in the order of its components and parts.

    Args:
        plan: of the build.
        keys: of the graphs (``graph_keys``).
    """
    found = [target for planned in plan.components for target in _targets(planned, keys[planned.component], plan)]
    shared = tuple(target for target in found if target.source == "transformers")
    alone = [Item(targets=(target,)) for target in found if target not in shared]
    return (*([Item(targets=shared)] if shared else []), *alone)


def _targets(planned: PlannedComponent, keys: Sequence[str], plan: Plan) -> Iterator[Target]:
    """A target for each part and each kind of source."""
    wanted = [backend for backend in (planned.finish, planned.backend) if backend is not None]
    for source in dict.fromkeys(BACKENDS[backend].source for backend in wanted):
        finish, backend = (
            name if name is not None and BACKENDS[name].source == source else None
            for name in (planned.finish, planned.backend)
        )
        parts = planned.parts if source == "graph" else (planned.graph,)
        for number, graph in enumerate(parts):
            shapes = profiles(graph, plan.recipe, plan.model)
            key = source_key(keys[number] if source == "graph" else whole_key(keys), source, shapes)
            yield Target(
                planned=planned,
                number=number,
                graph=graph,
                source=source,
                key=key,
                shapes=shapes,
                finish=finish,
                backend=backend,
                engine=None if backend is None else engine_key(key, backend, plan.recipe, shapes),
                stem=stem(planned.component, number, len(parts)),
            )
