"""A component as ONNX: the graph itself and the parameters that it names.

A graph is written module by module with ``onnxscript.nn``; module names mirror the checkpoint's, so that every
parameter's qualified name is the checkpoint's tensor name. No weight is loaded: a graph of the published transformer
takes seconds and a few hundred megabytes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.weight import DType, Layout, Weight
from qie.engines.bundle.manifest import Component, TensorSpec

__all__ = ["DTYPES", "IR_VERSION", "OPSET", "Graph", "Parameter", "constant", "write_graph"]

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding; onnxruntime and TensorRT both execute it."""

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
    """A named tensor of the checkpoint: shape and dtype as the graph wants them, layout as the way to get there."""

    def __init__(self, shape: Sequence[int], dtype: DType, layout: tuple[Layout, ...] = ()) -> None:
        super().__init__(shape, dtype=DTYPES[dtype])
        self.dims = tuple(shape)
        self.weight_dtype: DType = dtype
        self.layout = layout


def constant(op: Any, values: Any, dtype: str = "float32") -> ir.Value:
    """A small constant tensor inside the graph."""
    number = len(op.builder.root.graph.initializers)
    return op.initializer(ir.tensor(values, dtype=DTYPES[dtype]), name=f"constant_{number}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """One component's graph, computing in ``dtype``.

    ``weights`` are the parameters in order of first use; pruned parts of the checkpoint are not among them.
    ``inputs`` and ``outputs`` give dtype and dims, where a name stands for a dimension that is free at run time.
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
        """Write ``body(op, *inputs)``, which returns the outputs in order."""
        values = [ir.Value(name=i.name, type=ir.TensorType(DTYPES[i.dtype]), shape=ir.Shape(i.dims)) for i in inputs]
        graph = ir.Graph(values, [], nodes=[], opset_imports={"": OPSET}, name=component)
        builder = GraphBuilder(graph)
        results = body(builder.op, *values)
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
        """Number of scalar weights; scales are none."""
        return sum(_size(w.shape) for w in self.weights if w.scale_of is None)

    def proto(self, location: str, places: dict[str, tuple[int, int]] | None) -> onnx.ModelProto:
        """The graph as a protobuf whose weights lie in the file ``location``.

        ``places`` maps each weight to (offset, length) in bytes; None leaves the weights without data, as names only
        (length 0), for a graph that is to be looked at and not to be run.
        """
        for weight in self.weights:
            offset, length = places[weight.name] if places is not None else (0, 0)
            self.model.graph.initializers[weight.name].const_value = ir.ExternalTensor(
                location,
                offset,
                length,
                DTYPES[weight.dtype],
                shape=ir.Shape(weight.shape),
                name=weight.name,
            )
        return ir.serde.serialize_model(self.model)

    def digest(self) -> str:
        """sha256 of structure, weight names and layouts: equal graphs have equal digests."""
        layouts = json.dumps([[w.name, w.subfolder, w.dtype, w.layout] for w in self.weights])
        proto = self.proto("", None).SerializeToString(deterministic=True)
        return hashlib.sha256(proto + layouts.encode()).hexdigest()


def write_graph(graph: Graph, path: Path, location: str, places: dict[str, tuple[int, int]] | None) -> None:
    """Write ``graph`` to ``path``; its weights lie beside it in the file ``location``."""
    path.write_bytes(graph.proto(location, places).SerializeToString(deterministic=True))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size
