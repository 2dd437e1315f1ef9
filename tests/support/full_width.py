"""Components of the published 2511 with few layers, whose engines a test compiles."""

import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import write_graph_of
from qie.compiler.graphs.graph import Graph, write_graph
from qie.compiler.planning.profiles import profiles
from qie.compiler.quantization.linears import linear_inputs, linears
from qie.compiler.quantization.qdq import insert_qdq
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.schema import Recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Weight
from qie.engines.bundle.manifest import Component, FileRecord, GraphRecord, QuantizationRecord

__all__ = ["RandomReader", "full_width_graph", "full_width_model", "write_full_width"]


class RandomReader:
    """Random weights in the checkpoint's shapes; the compiler would fold zeros."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self._weights = {weight.name: weight for weight in weights}

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights[name]
        if "last_frame" in weight.layout:
            return (*weight.shape[:2], 1, *weight.shape[2:])
        return weight.shape[::-1] if "transpose" in weight.layout else weight.shape

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    def read(self, name: str) -> Any:
        """Of either sign, from 1/128 to 1/64."""
        shape = self.shape(name)
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**16, shape, np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)


def full_width_model(folder: Path, *, transformer: int, language: int, vision: int) -> Model:
    """The published 2511 with these numbers of layers, from configs in ``folder``."""
    architecture = replace(
        ARCHITECTURES["qwen-image-edit-2511"],
        num_layers=transformer,
        text_layers=language,
        text_vocab_size=2048,
        vision_depth=vision,
        vision_fullatt_block_indexes=(vision - 1,),
    )
    return open_checkpoint(str(write_checkpoint(folder, architecture, weights=False)), weights=False).model


def full_width_graph(
    component: Component, model: Model, recipe: Recipe, scheme: Any = None
) -> tuple[Graph, QuantizationRecord | None]:
    """A component's graph; with a scheme, all its linears are quantized."""
    graph = write_graph_of(component, model, recipe)
    if scheme is None:
        return graph, None
    names, total = linears(graph), len(linear_inputs(graph))
    quantized = insert_qdq(graph, SCHEMES[scheme], names, dict.fromkeys(names, 4.0), {})
    return quantized, QuantizationRecord(scheme=scheme, quantized=len(names), linears=total)


def write_full_width(
    graph: Graph, record: QuantizationRecord | None, model: Model, recipe: Recipe, folder: Path
) -> GraphRecord:
    """Write ``graph`` and random weights into ``folder``, for an engine with the profiles of ``recipe``."""
    reader = RandomReader(graph.weights)
    written = write_weights(graph.weights, {weight.subfolder: reader for weight in graph.weights}, folder / "weights")
    write_graph(graph, folder / "graph.onnx", "weights", {e.name: (e.offset, e.length) for e in written.entries})
    return GraphRecord(
        component=graph.component,
        backend="tensorrt-rtx",
        precision=graph.dtype,
        key="0" * 64,
        path="graph.onnx",
        files=(FileRecord(path="weights", bytes=written.bytes, sha256=written.sha256),),
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters(),
        profiles=profiles(graph, recipe, model),
        quantization=record,
    )
