"""The builder for vLLM, which executes a text encoder as it is: a build checks what it can without loading it.

Neither vLLM nor a GPU is needed: the session of the machine that runs it loads the text encoder.
"""

import resource
import time
from pathlib import Path

from qie.compiler.backends.vllm.checkpoint import WEIGHTS_FILE
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.recipe.schema import Recipe
from qie.engines import backends
from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.errors import BuildError, QieError
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.vllm.settings import SETTINGS_FILE, read_settings

__all__ = ["build", "unavailable", "version"]

BACKEND = "vllm"


def version() -> str:
    """The version of the installed package; "unknown" where none is installed."""
    return backends.version(BACKEND)


def unavailable(recipe: Recipe, device: int | None = None) -> str | None:
    """None: nothing is compiled."""
    return None


def build(
    graph: GraphRecord,
    folder: Path,
    *,
    key: str,
    recipe: Recipe,
    device: int | None = None,
    progress: StageProgress = no_progress,
) -> EngineRecord:
    """Check the text encoder ``graph``, whose files are those of the engine (``Builder.build``).

    Raises:
        BuildError: its tensors are not complete, or its limits are not those of the recipe.
    """
    start = time.perf_counter()
    place = (folder / graph.path).parent
    try:
        names = open_file(place / WEIGHTS_FILE).names()
        settings = read_settings(place / SETTINGS_FILE)
    except QieError as problem:
        found, _, _ = str(problem).partition(";")
        raise BuildError(f"the text encoder for {BACKEND} is damaged ({found}); build the bundle again") from problem
    prefix = "model.visual." if graph.component == "vision" else "model.language_model."
    longest = max((p.max[-1] for p in graph.profiles if p.input == "input_ids"), default=settings.positions)
    if not any(name.startswith(prefix) for name in names) or longest > settings.positions:
        raise BuildError(
            f"the text encoder for {BACKEND} has no {graph.component} for {longest} tokens; build the bundle again"
        )
    return EngineRecord(
        component=graph.component,
        backend=BACKEND,
        compute_capability=recipe.compute_capability or "cpu",
        backend_version=version(),
        precision=graph.precision,
        key=key,
        path=graph.path,
        files=graph.files,
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters,
        quantization=graph.quantization,
        build_seconds=round(time.perf_counter() - start, 3),
        build_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        profiles=() if recipe.compute_capability is None else graph.profiles,
    )
