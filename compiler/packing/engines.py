"""Engines of the graphs in a folder."""

from pathlib import Path

from qie.compiler.backends import BUILDERS
from qie.compiler.planning.keys import engine_key
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import EngineRecord, FileRecord, GraphRecord
from qie.engines.progress import Progress

__all__ = ["build_engine", "drop_graph", "engine_files"]


def build_engine(
    backend: str, graph: GraphRecord, folder: Path, recipe: Recipe, progress: Progress, device: int | None = None
) -> EngineRecord:
    """Build an engine of ``graph``, whose files lie in ``folder``, into the same folder, on the GPU ``device``.

    Raises:
        RecipeError, BuildError: see the backend's builder.
    """
    name = graph.path.removesuffix(".onnx") if BACKENDS[backend].source == "graph" else graph.component
    return BUILDERS[backend].build(
        graph,
        folder,
        key=engine_key(graph.key, backend, recipe, graph.profiles),
        recipe=recipe,
        device=device,
        progress=lambda done, total: progress(f"compile {name}", done, total),
    )


def drop_graph(graph: GraphRecord, engine: EngineRecord, folder: Path) -> None:
    """Delete the files of ``graph`` that ``engine``, built from it, does not use."""
    for record in graph.files:
        if record not in engine.files:
            (folder / record.path).unlink()
    parent = (folder / graph.path).parent
    if parent != folder and not any(parent.iterdir()):
        parent.rmdir()


def engine_files(engine: EngineRecord) -> tuple[FileRecord, ...]:
    """All files of ``engine`` in its bundle."""
    return engine.files if engine.structure is None else (*engine.files, engine.structure)
