"""Writes what engines are made from into a folder: a graph, a checkpoint of TensorRT-LLM, or a text encoder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from qie.compiler.backends.tensorrt_llm.builder import write_files
from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.tensors import whole_groups
from qie.compiler.backends.vllm.checkpoint import FILES, write_text_encoder
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.graphs.graph import Graph, write_graph
from qie.compiler.packing.items import Target
from qie.compiler.packing.readers import Readers
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.profiles import profiles
from qie.compiler.planning.sources import language_settings, text_encoder_settings
from qie.compiler.quantization.linears import linear_inputs
from qie.compiler.recipe.schema import BackendName
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weights_file import WeightFile
from qie.engines.backends import Source
from qie.engines.bundle.manifest import FileRecord, GraphRecord, QuantizationRecord, file_record
from qie.engines.progress import Progress, StageProgress

__all__ = [
    "LLM_FOLDER",
    "TEXT_ENCODER",
    "weights_name",
    "write_graph_source",
    "write_other_source",
    "write_part",
    "write_tensorrt_llm",
    "write_transformers",
]

LLM_FOLDER = "language.tensorrt-llm"
"""Folder of the checkpoint for TensorRT-LLM."""

TEXT_ENCODER = "text_encoder.vllm"
"""Name of the folder of the text encoder."""


def write_part(
    graph: Graph, name: str, readers: Readers, folder: Path, progress: StageProgress
) -> tuple[str, tuple[FileRecord, ...]]:
    """Write ``graph`` and its weights, in files whose names begin with ``name``, into ``folder``.

    Returns:
        The path of the graph in ``folder``, and the records of both files.

    Raises:
        QieError: see ``write_weights``.
    """
    written = write_weights(graph.weights, readers, folder / f"{name}.weights", progress=progress)
    return _write_beside(graph, name, written, folder)


def weights_name(target: Target) -> str:
    """Name of the file of a graph's weights."""
    return f"{target.stem}.weights"


def write_graph_source(target: Target, written: WeightFile, folder: Path, backend: BackendName) -> GraphRecord:
    """Write the graph of ``target`` beside its weights, which are in ``folder`` already.

    Args:
        target: a part of a component.
        written: its weights.
        folder: of the piece.
        backend: that the engine is for.
    """
    return _record(target, backend, *_write_beside(target.graph, target.stem, written, folder))


def write_other_source(
    target: Target, plan: Plan, readers: Readers, folder: Path, backend: BackendName, *, progress: Progress
) -> GraphRecord:
    """Write what the engine of ``backend`` is made from, where that is no graph.

    Args:
        target: a component.
        plan: of the build.
        readers: of the checkpoint, with everything folded into its tensors.
        folder: of the piece.
        backend: that the engine is for.
        progress: called with (component, bytes done, bytes in all).

    Raises:
        QieError: the weights cannot be read, or a disk is full.
    """
    write = _WRITERS[target.source]
    path, files = write(target.planned, plan, readers, folder, partial(progress, target.planned.component))
    return _record(target, backend, path, files)


def _write_beside(graph: Graph, name: str, written: WeightFile, folder: Path) -> tuple[str, tuple[FileRecord, ...]]:
    """Write ``graph`` beside the file of its weights: its path, and the records of both files."""
    path = f"{name}.onnx"
    write_graph(graph, folder / path, written.path.name, written.places)
    weights = FileRecord(path=written.path.name, bytes=written.bytes, sha256=written.sha256)
    return path, (file_record(folder, path), weights)


def _record(target: Target, backend: BackendName, path: str, files: tuple[FileRecord, ...]) -> GraphRecord:
    """The record of what the engine of ``backend`` is made from."""
    return GraphRecord(
        component=target.planned.component,
        backend=backend,
        precision=target.graph.dtype,
        key=target.key,
        path=path,
        files=files,
        inputs=target.graph.inputs,
        outputs=target.graph.outputs,
        parameters=target.graph.parameters(),
        quantization=_quantization(target),
        profiles=target.shapes,
        part=target.number,
    )


def write_tensorrt_llm(
    planned: PlannedComponent,
    plan: Plan,
    readers: Readers,
    folder: Path,
    progress: StageProgress,
    tensor_parallel: int = 1,
) -> tuple[str, tuple[FileRecord, ...]]:
    """Write the checkpoint of the language model for TensorRT-LLM, and what building its engine takes.

    Args:
        planned: the language model.
        plan: of the build.
        readers: of the checkpoint, with everything folded into its tensors.
        folder: in which ``LLM_FOLDER`` is made.
        progress: called with (bytes done, bytes in all).
        tensor_parallel: GPUs over which the model is split.

    Returns:
        The path of its config.json in ``folder``, and the records of all files.

    Raises:
        QieError: see ``write_checkpoint``.
    """
    settings = language_settings(plan.model, plan.recipe, planned.amax, tensor_parallel=tensor_parallel)
    (folder / LLM_FOLDER).mkdir(exist_ok=True)
    files = write_checkpoint(settings, readers["text_encoder"], folder / LLM_FOLDER, progress=progress)
    files += write_files(folder / LLM_FOLDER, profiles(planned.graph, plan.recipe, plan.model), plan.recipe)
    return f"{LLM_FOLDER}/config.json", tuple(file_record(folder, f"{LLM_FOLDER}/{file}") for file in files)


def write_transformers(
    planned: PlannedComponent, plan: Plan, readers: Readers, folder: Path, progress: StageProgress
) -> tuple[str, tuple[FileRecord, ...]]:
    """Write the text encoder, which vision and language share where vLLM runs both: the first to come writes it.

    Args:
        planned: vision or language.
        plan: of the build.
        readers: of the checkpoint.
        folder: in which ``TEXT_ENCODER`` is made.
        progress: called with (bytes done, bytes in all).

    Returns:
        The path of its config.json in ``folder``, and the records of all files.

    Raises:
        QieError: see ``write_text_encoder``.
    """
    place = folder / TEXT_ENCODER
    if not (place / "config.json").is_file():  # the last file, of this build
        place.mkdir(exist_ok=True)
        settings = text_encoder_settings(
            plan.model, plan.recipe, [p.graph for p in plan.components if p.in_text_encoder]
        )
        tokenizer = load_tokenizer(plan.checkpoint.path)
        write_text_encoder(settings, readers["text_encoder"], tokenizer, place, progress=progress)
    return f"{TEXT_ENCODER}/config.json", tuple(file_record(folder, f"{TEXT_ENCODER}/{name}") for name in FILES)


_WRITERS: dict[Source, Callable[..., tuple[str, tuple[FileRecord, ...]]]] = {
    "tensorrt-llm": write_tensorrt_llm,
    "transformers": write_transformers,
}
"""Source, but a graph -> what writes it into a folder: the path of the file that is opened, and the records of all."""


def _quantization(target: Target) -> QuantizationRecord | None:
    planned = target.planned
    if planned.scheme == "none":
        return None
    if target.source == "tensorrt-llm":
        quantized, linears = len(whole_groups(planned.amax)), planned.linears
    else:
        quantized = sum(w.quantizer is not None and w.scale_of is None for w in target.graph.weights)
        linears = quantized + len(linear_inputs(target.graph))
    return QuantizationRecord(scheme=planned.scheme, quantized=quantized, linears=linears)
