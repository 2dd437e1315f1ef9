"""A component as ONNX: the graph and the parameters that it names.

A graph is written module by module with ``onnxscript.nn``. Module names mirror the checkpoint's, so the qualified name
of every parameter is the checkpoint's tensor name. No weight is loaded: the graph of the published transformer takes
seconds and a few hundred megabytes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.graphs.source import SourceLines
from qie.compiler.weights.weight import DType, Layout, Weight
from qie.engines.bundle.manifest import Component, TensorSpec
from qie.engines.files import replacing

__all__ = ["DTYPES", "IR_VERSION", "OPSET", "Graph", "Parameter", "constant", "write_graph"]

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding; onnxruntime and TensorRT both support it."""

IR_VERSION = 11
"""The ONNX IR version that belongs to opset 23."""

DTYPES: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


class Parameter(nn.Parameter):
    """A tensor of the checkpoint: shape and dtype in the graph, and the layout steps that lead to them."""

    def __init__(self, shape: Sequence[int], dtype: DType, layout: tuple[Layout, ...] = ()) -> None:
        super().__init__(shape, dtype=DTYPES[dtype])
        self.dims = tuple(shape)
        self.weight_dtype: DType = dtype
        self.layout = layout


def constant(op: Any, values: Any, dtype: str = "float32") -> ir.Value:
    """A small constant tensor stored inside the graph."""
    number = len(op.builder.root.graph.initializers)
    return op.initializer(ir.tensor(values, dtype=DTYPES[dtype]), name=f"constant_{number}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """The graph of one component.

    Attributes:
        component: the component.
        dtype: the dtype in which the graph computes.
        model: the ONNX model, without weight data.
        inputs, outputs: names, dtypes and dims; a dim that is a name is free at run time.
        weights: the parameters in order of first use, without the pruned tensors of the checkpoint.
    """

    component: Component
    dtype: DType
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[Weight, ...]

    @classmethod
    def trace(
        cls,
        component: Component,
        subfolder: Subfolder,
        dtype: DType,
        body: Callable[..., Sequence[ir.Value]],
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> "Graph":
        """The graph of ``body(op, *inputs)``, which returns the outputs in order."""
        values = [ir.Value(name=i.name, type=ir.TensorType(DTYPES[i.dtype]), shape=ir.Shape(i.dims)) for i in inputs]
        graph = ir.Graph(values, [], nodes=[], opset_imports={"": OPSET}, name=component)
        builder = GraphBuilder(graph)
        results = body(SourceLines(builder.op), *values)
        assert len(results) == len(outputs)
        for value, spec in zip(results, outputs, strict=True):
            value.name = spec.name
            value.type = ir.TensorType(DTYPES[spec.dtype])
            value.shape = ir.Shape(spec.dims)
            graph.outputs.append(value)
        weights = tuple(
            Weight(
                name=name,
                subfolder=subfolder,
                shape=value.dims,
                dtype=value.weight_dtype,
                layout=value.layout,
            )
            for name, value in graph.initializers.items()
            if isinstance(value, Parameter)
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="qie")
        return cls(
            component=component,
            dtype=dtype,
            model=model,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=weights,
        )

    @property
    def subfolder(self) -> Subfolder:
        """The subfolder of the checkpoint that holds the weights."""
        return self.weights[0].subfolder

    def parameters(self) -> int:
        """Number of scalar weights, without quantization scales."""
        return sum(math.prod(w.shape) for w in self.weights if w.scale_of is None)

    def proto(self, location: str, places: dict[str, tuple[int, int]] | None) -> onnx.ModelProto:
        """The graph as a protobuf with its weights as external data.

        Args:
            location: the file of the weights, relative to the graph's.
            places: (offset, length) of each weight in bytes; None gives every weight length 0, for a graph that is
                inspected and never run.
        """
        initializers = self.model.graph.initializers
        for weight in self.weights:
            offset, length = places[weight.name] if places is not None else (0, 0)
            initializers[weight.name].const_value = ir.ExternalTensor(
                location, offset, length, DTYPES[weight.dtype], shape=ir.Shape(weight.shape), name=weight.name
            )
        try:
            return ir.serde.serialize_model(self.model)
        finally:
            for weight in self.weights:
                initializers[weight.name].const_value = None

    def digest(self) -> str:
        """The sha256 of structure, weight names and layouts; where the code of a node stands does not count."""
        layouts = json.dumps([[w.name, w.subfolder, w.dtype, w.layout] for w in self.weights])
        proto = self.proto("", None)
        for node in proto.graph.node:
            del node.metadata_props[:]
        return hashlib.sha256(proto.SerializeToString(deterministic=True) + layouts.encode()).hexdigest()


def write_graph(graph: Graph, path: Path, location: str, places: dict[str, tuple[int, int]] | None) -> None:
    """Write ``graph`` to ``path``, with its weights in the file ``location`` beside it (``Graph.proto``).

    An earlier file is replaced and not written to: another name of it, as in another bundle, keeps its content.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(graph.proto(location, places).SerializeToString(deterministic=True))
