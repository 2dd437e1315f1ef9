"""What the tests of builders share: recipes for small models, graphs of a few nodes, and a scripted worker."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import GraphRecord, ProfileRecord, TensorSpec, file_record

Worker = Callable[[str], Path]
"""Replaces the worker process by a script; returns a file that exists once the script has run."""

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
"""Marks a test that compiles with TensorRT for RTX."""


def small(name: str) -> Recipe:
    """The recipe without quantization, for models with small image areas, and for a machine with little memory."""
    recipe = load_recipe(name)
    plain = replace(recipe.components, transformer=replace(recipe.components.transformer, scheme="none", exclude=()))
    return replace(
        recipe,
        components=plain,
        shapes=replace(recipe.shapes, min_side=32),
        limits=replace(recipe.limits, build_workspace_gib=2.0),
    )


def record(folder: Path, model: onnx.ModelProto, **shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> GraphRecord:
    """Write ``model`` as the transformer's graph into ``folder``; ``shapes`` are (min, max) of each input."""
    path = folder / "transformer.onnx"
    path.write_bytes(model.SerializeToString())
    return GraphRecord(
        component="transformer",
        backend="tensorrt-rtx",
        precision="bfloat16",
        key="0" * 64,
        path=path.name,
        files=(file_record(folder, path.name),),
        inputs=(TensorSpec(name="x", dtype="bfloat16", dims=("n", 64)),),
        outputs=(TensorSpec(name="y", dtype="bfloat16", dims=("n", 64)),),
        parameters=0,
        profiles=tuple(ProfileRecord(input=name, min=low, opt=high, max=high) for name, (low, high) in shapes.items()),
    )


def model_of(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], *inputs: Any) -> onnx.ModelProto:
    inputs = inputs or (helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 64]),)
    outputs = [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, None)]
    graph = helper.make_graph(nodes, "g", list(inputs), outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def linear(op: str = "MatMul") -> onnx.ModelProto:
    """One matrix product of x [n, 64] with random weights."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(ml_dtypes.bfloat16)
    return model_of([helper.make_node(op, ["x", "w"], ["y"], name="product")], [numpy_helper.from_array(weights, "w")])


def fp8_linear() -> onnx.ModelProto:
    """The product of ``linear`` with both operands in FP8, dequantized to bfloat16."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = [numpy_helper.from_array(np.array(0.5, np.float32), name) for name in ("sx", "sw")]
    zero = numpy_helper.from_array(np.array(0, ml_dtypes.float8_e4m3fn), "zero")
    nodes = [
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["x32", "sx", "zero"], ["x8"], name="quantize"),
        helper.make_node("DequantizeLinear", ["x8", "sx", "zero"], ["xd"], output_dtype=TensorProto.BFLOAT16),
        helper.make_node("DequantizeLinear", ["w", "sw", "zero"], ["wd"], output_dtype=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], name="product"),
    ]
    return model_of(nodes, [numpy_helper.from_array(weights, "w"), zero, *scales])


SHAPES = {"x": ((1, 64), (256, 64))}
