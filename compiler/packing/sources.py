"""Writes what engines are made from into a bundle: a graph, a checkpoint of TensorRT-LLM, or a text encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.backends.tensorrt_llm.builder import write_files
from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.tensors import whole_groups
from qie.compiler.backends.vllm.checkpoint import FILES, write_text_encoder
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.graphs.graph import Graph, write_graph
from qie.compiler.packing.take_over import take_over
from qie.compiler.planning.keys import source_key, whole_key
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.planning.profiles import profiles
from qie.compiler.planning.sources import language_settings, text_encoder_settings
from qie.compiler.quantization.linears import linear_inputs
from qie.compiler.weights.stream import write_weights
from qie.engines.backends import BACKENDS, Source
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import FileRecord, GraphRecord, QuantizationRecord, file_record, stem
from qie.engines.progress import Progress, StageProgress

__all__ = ["LLM_FOLDER", "TEXT_ENCODER", "write_part", "write_source", "write_tensorrt_llm", "write_transformers"]

LLM_FOLDER = "language.tensorrt-llm"
"""Folder of the checkpoint for TensorRT-LLM."""

Readers = Mapping[Subfolder, TensorReader]

TEXT_ENCODER = "text_encoder.vllm"
"""Name of the folder of the text encoder."""


def write_source(
    planned: PlannedComponent,
    *,
    part: int,
    plan: Plan,
    keys: Sequence[str],
    readers: Readers,
    old: Bundle | None,
    folder: Path,
    backend: str,
    progress: Progress,
) -> GraphRecord:
    """Write what an engine of ``backend`` is made from into ``folder``, or take it over from an earlier bundle.

    Args:
        planned: the component.
        part: number of its part, see ``PlannedComponent.parts_for``.
        plan: of the build.
        keys: of the graph and weights of each part of the component.
        readers: of the checkpoint, with everything folded into its tensors.
        old: the earlier bundle; None where there is none.
        folder: of the new bundle.
        backend: that the engine is for.
        progress: called with (component, bytes done, bytes in all).

    Raises:
        QieError: the weights cannot be read, or a disk is full.
    """
    source, parts = BACKENDS[backend].source, planned.parts_for(backend)
    graph = parts[part]
    shapes = profiles(graph, plan.recipe, plan.model)
    key = source_key(keys[part] if source == "graph" else whole_key(keys), source, shapes)
    if old is not None:
        for record in old.manifest.graphs:
            if record.key == key and record.part == part and take_over(record.files, old, folder):
                return replace(record, backend=backend, profiles=shapes)
    name = stem(planned.component, part, len(parts))
    if source == "graph":
        path, files = write_part(graph, name, readers, folder, partial(progress, name))
    else:
        path, files = _WRITERS[source](planned, plan, readers, folder, partial(progress, name))
    return GraphRecord(
        component=planned.component,
        backend=backend,
        precision=graph.dtype,
        key=key,
        path=path,
        files=files,
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters(),
        quantization=_quantization(planned, graph, source),
        profiles=shapes,
        part=part,
    )


def write_part(
    graph: Graph, name: str, readers: Readers, folder: Path, progress: StageProgress
) -> tuple[str, tuple[FileRecord, ...]]:
    """Write ``graph`` and its weights, in files whose names begin with ``name``, into ``folder``.

    Returns:
        The path of the graph in ``folder``, and the records of both files.

    Raises:
        QieError: see ``write_weights``.
    """
    graph_name, weights_name = f"{name}.onnx", f"{name}.weights"
    written = write_weights(graph.weights, readers, folder / weights_name, progress=progress)
    write_graph(graph, folder / graph_name, weights_name, written.places)
    weights = FileRecord(path=weights_name, bytes=written.bytes, sha256=written.sha256)
    return graph_name, (file_record(folder, graph_name), weights)


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
"""Source of a whole component -> what writes it into the folder: the path of the file that is opened, and the records
of all."""


def _quantization(planned: PlannedComponent, graph: Graph, source: Source) -> QuantizationRecord | None:
    if planned.scheme == "none":
        return None
    if source == "tensorrt-llm":
        quantized = len(whole_groups(planned.amax))
        return QuantizationRecord(scheme=planned.scheme, quantized=quantized, linears=planned.linears)
    quantized = sum(weight.quantizer is not None and weight.scale_of is None for weight in graph.weights)
    return QuantizationRecord(scheme=planned.scheme, quantized=quantized, linears=quantized + len(linear_inputs(graph)))
