"""Changes of the graph and of the weights of a component, after which the manifest is sealed again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np
import onnx
from numpy.typing import NDArray

from qie.compiler.validation.onnx_file import read_graph
from tests.support.faults.sealing import reseal

__all__ = ["constant_of", "exchange", "graph_changed", "nodes_in", "weight_changed", "weights_changed"]

Array = NDArray[Any]


def graph_changed(component: str, change: Callable[[onnx.GraphProto], object]) -> Callable[[Path], None]:
    """Apply ``change`` to the graph of ``component``."""

    def breaks(bundle: Path) -> None:
        path = bundle / f"{component}.onnx"
        model = read_graph(path)
        change(model.graph)
        path.write_bytes(model.SerializeToString())
        reseal(bundle)

    return breaks


def weight_changed(component: str, name: str, change: Callable[[Array], object]) -> Callable[[Path], None]:
    """Apply ``change`` to the weight ``name``, in place; a linear has [in, out]."""
    return weights_changed(component, [name], change)


def weights_changed(component: str, names: list[str], change: Callable[..., object]) -> Callable[[Path], None]:
    """Apply ``change`` to the weights ``names`` together, in place."""

    def breaks(bundle: Path) -> None:
        graph = read_graph(bundle / f"{component}.onnx").graph
        mapped = [_mapped(bundle, graph, name) for name in names]
        before = [array.copy() for array in mapped]
        change(*mapped)
        assert any(not np.array_equal(*pair) for pair in zip(mapped, before, strict=True)), names
        for array in mapped:
            array.flush()
        reseal(bundle)

    return breaks


def _mapped(bundle: Path, graph: onnx.GraphProto, name: str) -> Any:
    """The weight ``name``, mapped for writing."""
    tensor = _weight(graph, name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    assert int(place["length"]) == math.prod(shape) * dtype.itemsize, name
    return np.memmap(bundle / place["location"], dtype, "r+", int(place["offset"]), shape)


def _weight(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    return tensor


def exchange(*pairs: tuple[str, str]) -> Callable[[onnx.GraphProto], None]:
    """The two weights of each pair in each other's place."""

    def change(graph: onnx.GraphProto) -> None:
        for one, other in pairs:
            first, second = _weight(graph, one), _weight(graph, other)
            assert first.dims == second.dims, (one, other)
            kept = list(first.external_data)
            first.ClearField("external_data")
            first.external_data.extend(second.external_data)
            second.ClearField("external_data")
            second.external_data.extend(kept)

    return change


def nodes_in(graph: onnx.GraphProto, scope: str, kind: str) -> list[onnx.NodeProto]:
    """The nodes of type ``kind`` whose names are in ``scope``, such as ``transformer_blocks.2``, in order."""
    found = [n for n in graph.node if n.op_type == kind and f"{scope}." in f"{n.name}.".replace("/", ".")]
    assert found, (scope, kind, [n.name for n in graph.node][:5])
    return found


def constant_of(graph: onnx.GraphProto, name: str) -> Array:
    """A constant inside the graph."""
    return np.array(onnx.numpy_helper.to_array(_weight(graph, name)))
