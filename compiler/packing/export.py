"""Writes the graphs of a checkpoint into a folder, with or without their weights, for other tools to read.

Where the language model is for TensorRT-LLM, its checkpoint is written beside its graph.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.backends.tensorrt_llm.tensors import checkpoint_bytes
from qie.compiler.backends.vllm.checkpoint import FILES
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.graphs.graph import write_graph
from qie.compiler.packing.readers import checkpoint_readers
from qie.compiler.packing.sources import LLM_FOLDER, TEXT_ENCODER, write_part, write_tensorrt_llm, write_transformers
from qie.compiler.packing.writing import writing
from qie.compiler.planning.checks import check_calibrated, check_download
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.sources import language_settings
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.manifest import COMPONENTS, stem
from qie.engines.errors import BuildError, ExportError
from qie.engines.folders import WORK_LOCK
from qie.engines.progress import Progress, no_progress

__all__ = ["export_graphs"]

_GRAPH_FILE = re.compile(rf"({'|'.join(COMPONENTS)})(\.\d+)?\.(onnx|weights)")
"""Of a component, or of one of its parts (``stem``)."""

_LLM_FILE = re.compile(r"config\.json|encoder\.py|build\.sh|rank\d+\.safetensors")


def export_graphs(
    plan: Plan,
    *,
    weights: bool,
    tensor_parallel: int = 1,
    in_parts: bool = False,
    progress: Progress = no_progress,
) -> tuple[Path, ...]:
    """Write every graph of ``plan`` to its destination, each component as a whole.

    Args:
        plan: of a build.
        weights: write the weights too. Without them the graphs name their parameters and hold none: they can be read,
            counted and drawn, not run.
        tensor_parallel: GPUs over which the checkpoint for TensorRT-LLM is split.
        in_parts: write the parts of components that are built in parts, in place of the whole.
        progress: called with (component, bytes done, bytes in all).

    Returns:
        The .onnx files, and those of a checkpoint for TensorRT-LLM or of a text encoder for vLLM.

    Raises:
        CalibrationError: a component is quantized, and there is no calibration.
        ExportError: the language model is not for TensorRT-LLM, or cannot be split over so many GPUs.
        CheckpointError: the weights are incomplete or do not belong to the configs.
        BuildError: the destination holds something else than graphs, or a disk is too small.
    """
    llm = [planned for planned in plan.components if "tensorrt-llm" in (planned.backend, planned.finish)]
    if tensor_parallel != 1 and not llm:
        raise ExportError(
            f"tensor_parallel is {tensor_parallel}, and the language model is not for TensorRT-LLM; choose "
            "tensorrt-llm as its backend",
            option="language",
        )
    _check_destination(plan.destination)
    if tensor_parallel != 1 and not weights:
        raise ExportError(
            f"tensor_parallel is {tensor_parallel}, and no weights are written to split; write them",
            option="weights",
        )
    settings = [
        language_settings(plan.model, plan.recipe, planned.amax, tensor_parallel=tensor_parallel) for planned in llm
    ]
    output_bytes = sum(total_bytes(planned.graph.weights) for planned in plan.components)
    output_bytes += sum(checkpoint_bytes(each) for each in settings)
    output_bytes += sum(planned.bytes for planned in plan.components if planned.in_text_encoder)
    readers: Mapping[Subfolder, TensorReader] = {}
    if weights:
        check_calibrated(plan)
        check_download(plan.checkpoint, destination=plan.destination, output_bytes=output_bytes)
        plan = replace(plan, checkpoint=plan.checkpoint.with_weights(progress=partial(progress, "download")))
        readers = checkpoint_readers(plan)
    with writing(plan.destination, output_bytes, lock=WORK_LOCK) as folder:
        graphs = {
            stem(planned.component, number, len(parts)): part
            for planned in plan.components
            for parts in [planned.parts if in_parts else (planned.graph,)]
            for number, part in enumerate(parts)
        }
        for name, graph in graphs.items():
            if weights:
                write_part(graph, name, readers, folder, partial(progress, name))
            else:
                write_graph(graph, folder / f"{name}.onnx", f"{name}.weights", None)
        names = [f"{name}.onnx" for name in graphs]
        for planned in llm if weights else ():
            of_component = partial(progress, f"{planned.component} for TensorRT-LLM")
            _, files = write_tensorrt_llm(planned, plan, readers, folder, of_component, tensor_parallel)
            names += [file.path for file in files]
        for planned in [planned for planned in plan.components if planned.in_text_encoder][:1] if weights else ():
            _, files = write_transformers(planned, plan, readers, folder, partial(progress, "text encoder for vLLM"))
            names += [file.path for file in files]
        _check_destination(plan.destination)  # what came meanwhile is not lost
    return tuple(plan.destination / name for name in names)


def _check_destination(path: Path) -> None:
    """An export replaces its folder: nothing but an earlier export may be lost."""
    if path.exists() and not (path.is_dir() and all(_is_exported(file.relative_to(path)) for file in path.rglob("*"))):
        raise BuildError(f"{path} holds files that are not exported graphs; choose another folder", option="out")


def _is_exported(name: Path) -> bool:
    """Whether an export writes a file or folder of that name."""
    if name.parts[0] == LLM_FOLDER:
        return len(name.parts) == 1 or (len(name.parts) == 2 and _LLM_FILE.fullmatch(name.parts[1]) is not None)
    if name.parts[0] == TEXT_ENCODER:
        return len(name.parts) == 1 or (len(name.parts) == 2 and name.parts[1] in FILES)
    return str(name) == WORK_LOCK or _GRAPH_FILE.fullmatch(str(name)) is not None
