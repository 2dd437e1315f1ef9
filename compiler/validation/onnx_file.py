"""What the file of an ONNX graph says about itself: inputs, outputs and dtypes of weights, without reading weights."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from qie.compiler.quantization.calibration import Calibration, read_calibration
from qie.compiler.quantization.linears import matching
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.quantization.smoothing import divided_outputs, smoothing_groups
from qie.compiler.recipe.quantizable import QUANTIZABLE
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord, GraphRecord, TensorSpec

__all__ = [
    "calibration_of",
    "graph_interface",
    "interface_of",
    "linears_of",
    "output_divisors",
    "quantized_linears",
    "read_graph",
    "wrong_precision",
]

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "float8_e4m3fn",
}

WEIGHT, SCALE = ".weight", ".scale"
"""Ends of the names of a linear's weight, and of the scales of a quantized weight."""


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph in the file ``path`` without its weights."""
    return onnx.load(str(path), load_external_data=False)


def graph_interface(path: Path) -> dict[str, str]:
    """The inputs and outputs of the graph in the file ``path`` by name, as ``interface_of`` writes them."""
    graph = read_graph(path).graph
    sides = (("input", graph.input), ("output", graph.output))
    return {f"{side} {value.name}": _described(value) for side, values in sides for value in values}


def interface_of(engine: EngineRecord | GraphRecord) -> dict[str, str]:
    """The inputs and outputs of ``engine`` by name, each as ``float32 [batch, noise_tokens, 64]``."""
    sides = (("input", engine.inputs), ("output", engine.outputs))
    return {f"{side} {spec.name}": _spec(spec) for side, specs in sides for spec in specs}


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{DTYPES.get(tensor.elem_type, tensor.elem_type)} [{', '.join(dims)}]"


def _spec(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.dims))}]"


def wrong_precision(bundle: Bundle, engine: EngineRecord | GraphRecord, recipe: Recipe) -> tuple[int, list[str]]:
    """Number of weights of the graph of ``engine``, and of those whose dtype is not the recipe's a sentence each."""
    graph = bundle.folder.read(lambda folder: read_graph(folder / engine.path)).graph
    dtypes = {
        weight.name: DTYPES.get(weight.data_type, str(weight.data_type))
        for weight in graph.initializer
        if weight.data_location == onnx.TensorProto.EXTERNAL or weight.name.endswith((WEIGHT, SCALE))
    }
    section = recipe.components[engine.component]
    linears = linears_of(engine, graph)
    expected_quantized = quantized_linears(bundle, engine, recipe, linears)
    stored = None if section.scheme == "none" else SCHEMES[section.scheme].weights
    scales = "float32" if stored is None or stored.per != "group" else section.precision
    expected = {
        name: scales
        if name.endswith(SCALE)
        else stored.dtype
        if stored is not None and name.removesuffix(WEIGHT) in expected_quantized
        else section.precision
        for name in dtypes
    }
    wrong = [
        f"{engine.component}: {name} is {dtypes[name]}, the recipe says {expected[name]}"
        for name in dtypes
        if dtypes[name] != expected[name]
    ]
    wrong += _other_counts(engine, expected_quantized, whole=not _parts_of(bundle, engine))
    casts = _casts(graph, section.precision)
    return len(dtypes), wrong + [f"{engine.component}: {name} computes in {dtype}" for name, dtype in casts.items()]


def _other_counts(record: EngineRecord | GraphRecord, quantized: set[str], *, whole: bool) -> Iterator[str]:
    """What the manifest says of the quantized linears and the graph does not have."""
    if record.quantization is None:
        return
    if not quantized and whole:
        yield f"{record.component}: the scheme {record.quantization.scheme} quantizes no linear"
    said = record.quantization.quantized
    if said != len(quantized):
        yield f"{record.component}: the manifest says {said} quantized linears, the recipe leaves {len(quantized)}"


def _casts(graph: onnx.GraphProto, precision: str) -> Mapping[str, str]:
    """The nodes that cast to a float that is neither float32 nor ``precision``, with that dtype."""
    found = {}
    for node in graph.node:
        if node.op_type == "Cast":
            (to,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
            dtype = DTYPES.get(to, str(to))
            if dtype in ("float16", "bfloat16") and dtype != precision:
                found[node.name] = dtype
    return found


def linears_of(engine: EngineRecord | GraphRecord, graph: onnx.GraphProto) -> list[str]:
    """The linears that a scheme may quantize, by name, in the order of their weights in the file."""
    pattern = QUANTIZABLE.get(engine.component)
    if pattern is None:
        return []
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    products = {dequantized.get(node.input[1], node.input[1]) for node in graph.node if node.op_type == "MatMul"}
    names = [w.name.removesuffix(WEIGHT) for w in graph.initializer if w.name in products and w.name.endswith(WEIGHT)]
    return [name for name in names if fnmatch(name, pattern)]


def quantized_linears(
    bundle: Bundle, engine: EngineRecord | GraphRecord, recipe: Recipe, linears: Sequence[str]
) -> set[str]:
    """Those of the ``linears`` of ``engine`` that the recipe, or the calibration in the bundle, leaves to the scheme.

    Patterns may count blocks from the end of the component, so the linears of its other parts decide too.
    """
    section = recipe.components[engine.component]
    if section.scheme == "none":
        return set()
    calibration = calibration_of(bundle)
    measured = None if calibration is None else calibration.exclude.get(f"{engine.component}/{section.scheme}")
    if measured is not None:
        return set(linears) - set(measured)
    every = [name for part in _parts_of(bundle, engine) for name in _linears_in(bundle, part)]
    return set(linears) - set(matching(every or linears, section.exclude))


def _parts_of(bundle: Bundle, engine: EngineRecord | GraphRecord) -> Sequence[EngineRecord | GraphRecord]:
    """All parts of the component of ``engine`` for its target, in order; none where it is the only one."""
    records: Sequence[EngineRecord | GraphRecord] = bundle.manifest.graphs
    if isinstance(engine, EngineRecord):
        records = [e for e in bundle.manifest.engines if e.compute_capability == engine.compute_capability]
    parts = [r for r in records if (r.component, r.backend) == (engine.component, engine.backend)]
    return sorted(parts, key=lambda record: record.part) if len(parts) > 1 else []


def _linears_in(bundle: Bundle, engine: EngineRecord | GraphRecord) -> list[str]:
    return linears_of(engine, bundle.folder.read(lambda folder: read_graph(folder / engine.path)).graph)


def output_divisors(bundle: Bundle, engine: EngineRecord, recipe: Recipe) -> dict[str, NDArray[np.float32]]:
    """The modules of the graph of ``engine`` whose outputs smoothing divides -> divisor of each channel."""
    section, calibration = recipe.components[engine.component], calibration_of(bundle)
    if section.scheme == "none" or calibration is None or engine.component not in SCHEMES[section.scheme].smoothed:
        return {}
    graph = bundle.folder.read(lambda folder: read_graph(folder / engine.path)).graph
    linears = linears_of(engine, graph)
    scales = calibration.smoothing_scales.get(section.scheme, {})
    quantized = quantized_linears(bundle, engine, recipe, linears)
    groups = [
        group
        for group in smoothing_groups(engine.component, linears)
        if group.name in scales and not quantized.isdisjoint(group.consumers)
    ]
    return divided_outputs(groups, scales)


def calibration_of(bundle: Bundle) -> Calibration | None:
    """The calibration that ``bundle`` was built with.

    Raises:
        CalibrationError: its file is damaged.
    """
    record = bundle.manifest.calibration
    if record is None:
        return None
    return bundle.folder.read(lambda folder: read_calibration(folder / record.path))
