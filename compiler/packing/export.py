"""Writes the graphs of a checkpoint into a folder, with or without their weights, for other tools to read."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.graphs.graph import write_graph
from qie.compiler.packing.pack import checkpoint_readers, writing
from qie.compiler.planning.checks import check_download
from qie.compiler.planning.plan import Plan
from qie.compiler.weights.stream import write_weights
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import BuildError
from qie.engines.folders import WORK_LOCK
from qie.engines.progress import Progress, no_progress

__all__ = ["export_graphs"]


def export_graphs(plan: Plan, *, weights: bool, progress: Progress = no_progress) -> tuple[Path, ...]:
    """Write every graph of ``plan`` to its destination.

    Without ``weights`` the graphs name their parameters and hold none: they can be read, counted and drawn, not run.

    Returns:
        The .onnx files.

    Raises:
        CheckpointError: the weights are incomplete or do not belong to the configs.
        BuildError: the destination holds something else than graphs, or a disk is too small.
    """
    _check_destination(plan.destination)
    output_bytes = sum(planned.bytes for planned in plan.components)
    readers: Mapping[Subfolder, TensorReader] = {}
    if weights:
        check_download(plan.checkpoint, destination=plan.destination, output_bytes=output_bytes)
        plan = replace(plan, checkpoint=plan.checkpoint.with_weights(progress=partial(progress, "download")))
        readers = checkpoint_readers(plan)
    with writing(plan.destination, output_bytes, lock=WORK_LOCK) as folder:
        for planned in plan.components:
            places, location = None, f"{planned.component}.weights"
            if weights:
                written = write_weights(
                    planned.graph.weights, readers, folder / location, progress=partial(progress, planned.component)
                )
                places = written.places
            write_graph(planned.graph, folder / f"{planned.component}.onnx", location, places)
        _check_destination(plan.destination)  # what came meanwhile is not lost
    return tuple(plan.destination / f"{planned.component}.onnx" for planned in plan.components)


def _check_destination(path: Path) -> None:
    """An export replaces its folder: nothing but an earlier export may be lost."""
    names = {f"{component}.{suffix}" for component in COMPONENTS for suffix in ("onnx", "weights")} | {WORK_LOCK}
    if path.exists() and not (path.is_dir() and {file.name for file in path.iterdir()} <= names):
        raise BuildError(f"{path} holds files that are not exported graphs; choose another folder", option="out")
