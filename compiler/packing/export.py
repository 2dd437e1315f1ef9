"""Writes the graphs of a checkpoint into a folder, with or without their weights, for other tools to read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from qie.compiler.graphs.graph import write_graph
from qie.compiler.packing.pack import checkpoint_readers, writing
from qie.compiler.planning.plan import Plan
from qie.compiler.weights.stream import write_weights
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import BuildError

__all__ = ["export_graphs"]


def export_graphs(
    plan: Plan, *, weights: bool, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> tuple[Path, ...]:
    """Write every graph of ``plan`` to its destination and return their files.

    Without ``weights`` the graphs name their parameters and hold none: they can be read, counted and drawn, not run.

    Raises:
        CheckpointError: configs and weights do not belong together.
        BuildError: the destination holds something else than graphs, or the disk is full.
    """
    _check_destination(plan.destination)
    readers = checkpoint_readers(plan) if weights else {}
    with writing(plan.destination, sum(part.bytes for part in plan.components)) as folder:
        for part in plan.components:
            places, location = None, f"{part.component}.weights"
            if weights:
                written = write_weights(
                    part.graph.weights,
                    readers,
                    folder / location,
                    progress=partial(progress, part.component),
                )
                places = written.places
            write_graph(part.graph, folder / f"{part.component}.onnx", location, places)
    return tuple(plan.destination / f"{part.component}.onnx" for part in plan.components)


def _check_destination(path: Path) -> None:
    """An export replaces its folder: nothing but an earlier export may be lost."""
    names = {f"{component}.{suffix}" for component in COMPONENTS for suffix in ("onnx", "weights")}
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= names):
        raise BuildError(f"{path} holds files that are not exported graphs; choose another folder", option="out")
