"""Builds engines for onnxruntime: the graph, its weights beside it, and the proof that onnxruntime loads them."""

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from qie.compiler.graphs.graph import Graph, write_graph
from qie.compiler.graphs.weight import Part
from qie.compiler.safetensor import TensorReader
from qie.compiler.weights import write_weights
from qie.engines.errors import BuildError
from qie.engines.files import sha256_of
from qie.engines.manifest import EngineRecord, FileRecord

__all__ = ["build", "version"]


def version() -> str:
    """Version of the onnxruntime that the engines are proven to load with."""
    return str(ort.__version__)


def build(
    graph: Graph,
    readers: Mapping[Part, TensorReader],
    folder: Path,
    *,
    key: str,
    progress: Callable[[int, int], None] | None = None,
) -> EngineRecord:
    """Write ``graph`` and its weights into ``folder`` and load them once.

    Raises:
        CheckpointError: configs and weights do not belong together.
        BuildError: the disk is full, or onnxruntime refuses the graph.
    """
    start = time.perf_counter()
    weights_name, graph_name = f"{graph.component}.weights", f"{graph.component}.onnx"
    written = write_weights(graph.weights, readers, folder / weights_name, progress=progress)
    places = {entry.name: (entry.offset, entry.length) for entry in written.entries}
    write_graph(graph, folder / graph_name, weights_name, places)
    _load(folder / graph_name)
    return EngineRecord(
        component=graph.component,
        backend="onnxruntime",
        compute_capability="cpu",
        backend_version=version(),
        precision=graph.dtype,
        key=key,
        path=graph_name,
        files=(
            FileRecord(
                path=graph_name, bytes=(folder / graph_name).stat().st_size, sha256=sha256_of(folder / graph_name)
            ),
            FileRecord(path=weights_name, bytes=written.bytes, sha256=written.sha256),
        ),
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters(),
        build_seconds=round(time.perf_counter() - start, 3),
        build_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _load(path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # weights stay mapped: no second copy
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as problem:
        raise BuildError(f"onnxruntime {version()} does not load the graph it was given: {problem}") from problem
