"""Builds the engines that a bundle still lacks, on the machine with the GPU."""

import shutil
from dataclasses import replace

from qie.compiler.backends import BUILDERS
from qie.compiler.packing.engines import build_engine, drop_graph
from qie.compiler.packing.made_from import bundle_recipe
from qie.compiler.packing.take_over import take_over
from qie.compiler.packing.writing import writing
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import GraphRecord
from qie.engines.bundle.sealed import write_manifest
from qie.engines.errors import BackendMissingError, BuildError, BundleError
from qie.engines.progress import Progress, no_progress

__all__ = ["finish_bundle"]


def finish_bundle(bundle: Bundle, *, device: int | None = None, progress: Progress = no_progress) -> Bundle:
    """Build the engines that ``bundle`` still waits for, with the backends that its recipe prefers.

    The new engines precede those that the bundle has already, and what they were built from is deleted. Of several
    backends, one that is not installed here is left for later. The bundle is replaced when all engines are built; until
    then it stays unchanged.

    Args:
        bundle: an opened bundle.
        device: CUDA index of the GPU to build on; None for the first that fits.
        progress: see ``qie.compiler.packing.build.build``.

    Raises:
        BackendMissingError: this machine can build none of them.
        BundleError: the bundle is damaged.
        RecipeError, BuildError: no graph is left, a builder failed, the disk is full, or the bundle was replaced or
            deleted meanwhile.
    """
    manifest = bundle.manifest
    if not manifest.graphs:
        raise BuildError(f"{bundle.path} has every engine that its recipe prefers; run edits with it")
    recipe = bundle_recipe(bundle)
    reasons = [_unavailable(graph, recipe, device) for graph in manifest.graphs]
    ready = [graph for graph, reason in zip(manifest.graphs, reasons, strict=True) if reason is None]
    if not ready:
        raise BackendMissingError(str(reasons[0]), option=None if device is None else "device")
    needed = sum(record.bytes for graph in ready for record in graph.files)
    free = shutil.disk_usage(bundle.path).free
    if needed > free:
        raise BuildError(f"finishing {bundle.path} needs {needed:,} bytes, and {free:,} are free; free some space")
    with writing(bundle.path, needed, replaces=bundle) as folder:
        if not take_over(manifest.files(), bundle, folder):
            raise BundleError(f"{bundle.path} is damaged; build the bundle again with `qie build`")
        engines = []
        for graph in ready:
            engine = build_engine(graph.backend, graph, folder, recipe, progress, device)
            drop_graph(graph, engine, folder)
            engines.append(engine)
        waiting = tuple(graph for graph in manifest.graphs if graph not in ready)
        write_manifest(replace(manifest, engines=(*engines, *manifest.engines), graphs=waiting), folder)
    return open_bundle(bundle.path.absolute())


def _unavailable(graph: GraphRecord, recipe: Recipe, device: int | None) -> str | None:
    """Why this machine cannot build the engine of ``graph``; None where it can."""
    if graph.backend not in BUILDERS:
        return f"{graph.component} needs an engine of {graph.backend}, which this qie does not build; upgrade qie"
    reason = BUILDERS[graph.backend].unavailable(recipe, device)
    return None if reason is None else f"{graph.component} cannot be built here: {reason}"
