"""The builder for onnxruntime, which executes graphs as they are: a build only checks that it loads them."""

import resource
import time
from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import serves_gpu
from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.errors import BuildError, first_line
from qie.engines.machine import choose_gpu, gpu_misfit, this_machine
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.onnxruntime import preload_cuda

__all__ = ["build", "unavailable", "version"]


def version() -> str:
    """The version of the installed onnxruntime."""
    return str(ort.__version__)


def unavailable(recipe: Recipe, device: int | None = None) -> str | None:
    """None: qie depends on onnxruntime."""
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
    """Load ``graph``, whose files are those of the engine, once (``Builder.build``).

    A graph for a GPU is loaded only where onnxruntime can use such a GPU: its CPU kernels do not support bfloat16.

    Raises:
        BuildError: onnxruntime does not load the graph.
    """
    start = time.perf_counter()
    capability = recipe.compute_capability
    if capability is None:
        _load(folder / graph.path, "CPUExecutionProvider", {})
    elif serves_gpu() and gpu_misfit(machine := this_machine(), capability, device) is None:
        preload_cuda()
        index = choose_gpu(machine, capability, device).index
        _load(folder / graph.path, "CUDAExecutionProvider", {"device_id": str(index)})
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
        part=graph.part,
    )


def _load(path: Path, provider: str, provider_options: Mapping[str, str]) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    try:
        ort.InferenceSession(str(path), options, providers=[(provider, provider_options)], enable_fallback=0)
    except Exception as problem:
        raise BuildError(
            f"onnxruntime {version()} does not load {path.name} ({first_line(problem)}); set the precision of the "
            'component to "float32" in the recipe, or install another version of onnxruntime'
        ) from problem
