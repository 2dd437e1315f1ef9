"""Builds the engines that a bundle still lacks from its graphs, on the machine with the GPU."""

import shutil
from dataclasses import replace

from qie.compiler.backends import BUILDERS
from qie.compiler.packing.pack import build_engine, drop_graph, writing
from qie.compiler.packing.take_over import take_over
from qie.compiler.recipe.load import parse_recipe
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import MANIFEST
from qie.engines.bundle.sealed import write_manifest
from qie.engines.errors import BackendMissingError, BuildError, BundleError, RecipeError
from qie.engines.progress import Progress, no_progress

__all__ = ["finish_bundle"]


def finish_bundle(bundle: Bundle, *, device: int | None = None, progress: Progress = no_progress) -> Bundle:
    """Build an engine of every graph in ``bundle`` for the backend that its recipe prefers.

    The new engines precede those that the bundle has already, and the graphs are deleted. The bundle is replaced when
    all engines are built; until then it stays unchanged.

    Args:
        bundle: an opened bundle.
        device: CUDA index of the GPU to build on; None for the first that fits.
        progress: see ``qie.compiler.packing.build.build``.

    Raises:
        BackendMissingError: this machine cannot build for the recipe's GPU.
        BundleError: the bundle is damaged.
        RecipeError, BuildError: no graph is left, a builder failed, or the disk is full.
    """
    manifest = bundle.manifest
    if not manifest.graphs:
        raise BuildError(f"{bundle.path} has every engine that its recipe prefers; run edits with it")
    try:
        recipe = parse_recipe(manifest.recipe.toml, bundle.path / MANIFEST)
    except RecipeError as error:
        problem, _, _ = str(error).partition(";")
        raise BundleError(
            f"the recipe of {bundle.path} cannot be read ({problem}); build the bundle again with `qie build`"
        ) from error
    for graph in manifest.graphs:
        if graph.backend not in BUILDERS:
            raise BackendMissingError(
                f"{graph.component} needs an engine of {graph.backend}, which this qie does not build; upgrade qie"
            )
        reason = BUILDERS[graph.backend].unavailable(recipe, device)
        if reason is not None:
            option = None if device is None else "device"
            raise BackendMissingError(f"{graph.component} cannot be built here: {reason}", option=option)
    needed = sum(record.bytes for graph in manifest.graphs for record in graph.files)
    free = shutil.disk_usage(bundle.path).free
    if needed > free:
        raise BuildError(f"finishing {bundle.path} needs {needed:,} bytes, and {free:,} are free; free some space")
    with writing(bundle.path, needed) as folder:
        if not take_over(manifest.files(), bundle, folder):
            raise BundleError(f"{bundle.path} is damaged; build the bundle again with `qie build`")
        engines = []
        for graph in manifest.graphs:
            engine = build_engine(graph.backend, graph, folder, recipe, progress, device)
            drop_graph(graph, engine, folder)
            engines.append(engine)
        write_manifest(replace(manifest, engines=(*engines, *manifest.engines), graphs=()), folder)
    return open_bundle(bundle.path.absolute())
