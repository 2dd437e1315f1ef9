"""What differs between two ONNX graphs of a component: operators, dtypes of weights, and the content of each weight."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qie.compiler.metrics.error import pooled_relative_l2
from qie.compiler.validation.diff.changes import Change, changes
from qie.compiler.validation.diff.structure import without_numbers
from qie.engines.bundle.bundle import Bundle, check_file
from qie.engines.bundle.manifest import EngineRecord, GraphRecord, ModulationRecord
from qie.engines.errors import BundleError, first_line
from qie.engines.inputs.modulation import BundleModulation

__all__ = ["GraphDiff", "GraphFile", "WeightChange", "diff_graphs", "diff_modulation", "distance"]

Array = NDArray[Any]

CHUNK = 1 << 24
"""Elements that are compared at a time: 128 MB in float64."""

AGAIN = "build the bundle again with `qie build`"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightChange:
    """A weight that differs.

    Attributes:
        name: of the tensor in the checkpoint.
        old, new: dtype and shape, such as ``float32 768x192``; None where there is no such weight.
        relative_l2: of the new values to the old ones, quantized ones times their scales; None where one is absent, the
            shapes differ, or the old ones are all zero.
    """

    name: str
    old: str | None
    new: str | None
    relative_l2: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphDiff:
    """What differs between two graphs.

    Attributes:
        nodes: operator -> number of nodes, for those whose number differs.
        dtypes: dtype -> number of weights of it, for those whose number differs.
        weights: those whose dtype, shape or content differs.
    """

    nodes: tuple[Change, ...]
    dtypes: tuple[Change, ...]
    weights: tuple[WeightChange, ...]

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return bool(self.nodes or self.dtypes or self.weights)


class GraphFile:
    """A graph of a bundle with its weights mapped from their files.

    Attributes:
        operators: number of nodes of each operator.
        weights: tensors with a name of their own, by that name.
    """

    def __init__(self, bundle: Bundle, record: EngineRecord | GraphRecord) -> None:
        """Read the graph and no weight.

        Raises:
            BundleError: the graph is damaged.
        """
        self._bundle, self._record = bundle, record
        self._path = bundle.path / record.path
        check_file(bundle, next(file for file in record.files if file.path == record.path))
        try:
            content = bundle.folder.read(lambda folder: (folder / record.path).read_bytes())
            model = onnx.load_model_from_string(content)
        except Exception as problem:  # protobuf's DecodeError, whose package has no types
            raise BundleError(f"{self._path} is no ONNX graph ({first_line(problem)}); {AGAIN}") from None
        self.operators = Counter(node.op_type for node in model.graph.node)
        self._groups = {node.input[0]: size for node in model.graph.node if (size := _group_size(node))}
        tensors = model.graph.initializer
        self.weights = {t.name: t for t in tensors if without_numbers(t.name) == t.name}

    def dtypes(self) -> Counter[str]:
        """Number of weights of each dtype, scales included."""
        return Counter(_dtype(tensor) for tensor in self.weights.values())

    def about(self, name: str) -> str | None:
        """Dtype and shape of a weight; None where there is no such weight."""
        tensor = self.weights.get(name)
        return None if tensor is None else _told(_dtype(tensor), tensor.dims)

    def names(self) -> tuple[str, ...]:
        """Names of the weights without their scales."""
        return tuple(name for name in self.weights if not self._is_scale(name))

    def values(self, name: str) -> Array:
        """A weight as the graph uses it: as stored, or quantized values times their scales.

        Scales are [], [out] or [groups, out] of a weight [in, out].

        Raises:
            BundleError: the weight is not where the graph says, or its file is damaged.
        """
        stored, scale = self.stored(name), f"{name}.scale"
        if scale not in self.weights:
            return stored
        scales = self.stored(scale).astype(np.float32)
        if scales.ndim == stored.ndim:
            scales = np.repeat(scales, self._groups.get(name, 1), axis=0)[: stored.shape[0]]
        try:
            return stored.astype(np.float32) * scales
        except ValueError:
            raise self._misplaced(scale) from None

    def stores_equally(self, other: "GraphFile", name: str) -> bool:
        """Whether ``other`` has the same bytes for a weight of the same dtype and shape, and for its scales."""
        parts = [part for part in (name, f"{name}.scale") if part in self.weights or part in other.weights]
        if any(self.about(part) != other.about(part) for part in parts):
            return False
        pairs = ((_bytes(self.stored(part)), _bytes(other.stored(part))) for part in parts)
        return all(mine == theirs for mine, theirs in pairs)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(".scale") and name.removesuffix(".scale") in self.weights

    def stored(self, name: str) -> Array:
        """A weight as its file has it."""
        tensor = self.weights[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = self._external(tensor)
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            packed = TensorProto(name=name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
            return numpy_helper.to_array(packed)
        try:
            return raw.view(dtype).reshape(tuple(tensor.dims))
        except ValueError:
            raise self._misplaced(name) from None

    def _external(self, tensor: TensorProto) -> NDArray[np.uint8]:
        """The bytes of a tensor in its file, which must be one of the graph's."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = (PurePosixPath(self._record.path).parent / entries.get("location", "")).as_posix()
        file = next((file for file in self._record.files if file.path == path), None)
        try:
            offset, length = int(entries.get("offset", 0)), int(entries["length"])
        except (KeyError, ValueError):
            raise self._misplaced(tensor.name) from None
        if file is None or offset < 0 or length < 0 or offset + length > file.bytes:
            raise self._misplaced(tensor.name)
        check_file(self._bundle, file)
        if not length:
            return np.zeros(0, np.uint8)
        mapped: NDArray[np.uint8] = self._bundle.folder.read(
            lambda folder: np.memmap(folder / path, np.uint8, "r", offset, (length,))
        )
        return mapped

    def _misplaced(self, name: str) -> BundleError:
        return BundleError(f"the weight {name!r} is not where {self._path} says; {AGAIN}")


def diff_graphs(old: GraphFile, new: GraphFile) -> GraphDiff:
    """What differs between two graphs of one component.

    Raises:
        BundleError: a file is damaged.
    """
    return GraphDiff(
        nodes=changes(old.operators, new.operators),
        dtypes=changes(old.dtypes(), new.dtypes()),
        weights=tuple(_weights(old, new)),
    )


def diff_modulation(old: Bundle, new: Bundle) -> tuple[WeightChange, ...]:
    """The modulation weights that differ; of a bundle that has tables alone only whether they do, as their file.

    Raises:
        BundleError: a file is damaged.
    """
    records = old.manifest.model.modulation, new.manifest.model.modulation
    if records[0].identity == records[1].identity or any(record.file is None for record in records):
        return ()
    shapes = [{t.name: _told(t.dtype, t.shape) for t in record.tensors} for record in records]
    readers = [_modulation(bundle, record) for bundle, record in zip((old, new), records, strict=True)]
    found = []
    for name in dict.fromkeys((*shapes[0], *shapes[1])):
        before, after = (shape.get(name) for shape in shapes)
        value = None
        if before is not None and after is not None:
            values = [reader.read(name) for reader in readers]
            if before == after and np.array_equal(values[0], values[1]):
                continue
            value = distance(values[1], values[0])
        found.append(WeightChange(name=name, old=before, new=after, relative_l2=value))
    return tuple(found)


def distance(values: Array, expected: Array) -> float | None:
    """The relative L2 error; None for other shapes, where all expected values are zero, or where it is not finite."""
    if values.shape != expected.shape or not expected.any():
        return None
    chunks = range(0, values.size, CHUNK)
    flat, exact = values.reshape(-1), expected.reshape(-1)
    found = pooled_relative_l2([flat[c : c + CHUNK] for c in chunks], [exact[c : c + CHUNK] for c in chunks])
    return found if math.isfinite(found) else None


def _weights(old: GraphFile, new: GraphFile) -> Iterable[WeightChange]:
    for name in dict.fromkeys((*old.names(), *new.names())):
        before, after = old.about(name), new.about(name)
        value = None
        if before is not None and after is not None:
            if old.stores_equally(new, name):
                continue
            value = distance(new.values(name), old.values(name))
        yield WeightChange(name=name, old=before, new=after, relative_l2=value)


def _modulation(bundle: Bundle, record: ModulationRecord) -> BundleModulation:
    assert record.file is not None, "a bundle without modulation weights"
    check_file(bundle, record.file)
    return bundle.folder.read(lambda folder: BundleModulation(folder, record))


def _group_size(node: onnx.NodeProto) -> int:
    """Rows of a weight that share a scale; 0 for what is no dequantization by groups."""
    if node.op_type != "DequantizeLinear":
        return 0
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "block_size"), 0)


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _told(dtype: str, dims: Iterable[int]) -> str:
    return f"{dtype} {'x'.join(map(str, dims))}".rstrip()


def _dtype(tensor: TensorProto) -> str:
    return str(helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
