"""Builds engines for onnxruntime, which executes graphs: what is built is the proof that it loads them."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort

from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.errors import BuildError

__all__ = ["build", "unavailable", "version"]


def version() -> str:
    """Version of the onnxruntime that the engines are proven to load with."""
    return str(ort.__version__)


def unavailable(recipe: Recipe) -> str | None:
    """None: qie needs onnxruntime to run at all."""
    return None


def build(
    graph: GraphRecord,
    folder: Path,
    *,
    key: str,
    recipe: Recipe,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EngineRecord:
    """Load ``graph``, whose files lie in ``folder``, once; its files are the engine's.

    A graph for a GPU is not loaded where onnxruntime can use none: a CPU has no kernels for bfloat16.

    Raises:
        BuildError: onnxruntime refuses the graph.
    """
    start = time.perf_counter()
    provider = "CPUExecutionProvider" if recipe.compute_capability is None else "CUDAExecutionProvider"
    if provider in ort.get_available_providers():
        _load(folder / graph.path, provider)
    return EngineRecord(
        component=graph.component,
        backend="onnxruntime",
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


def _load(path: Path, provider: str) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped: no second copy
    try:
        ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as problem:
        raise BuildError(f"onnxruntime {version()} does not load the graph it was given: {problem}") from problem
