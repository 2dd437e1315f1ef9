"""FP8 is rejected for a GPU without it before the compiler starts, and compiled for a GPU with it."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qie.compiler.backends import BUILDERS
from qie.compiler.backends.tensorrt.datatypes import check_datatypes
from qie.engines.errors import BuildError, RecipeError
from tests.support.small_graphs import SHAPES, Worker, fp8_linear, linear, model_of, needs_rtx, record, small

RTX = BUILDERS["tensorrt-rtx"]


def test_fp8_is_rejected_below_8_9_before_the_compiler_starts(tmp_path: Path, worker: Worker) -> None:
    graph = record(tmp_path, fp8_linear(), **SHAPES)
    called = worker("sys.exit('called')")
    with pytest.raises(
        RecipeError, match=r"transformer computes in FP8 .*needs compute capability 8\.9.*A100 80GB has"
    ):
        RTX.build(graph, tmp_path, key="k", recipe=small("a100"))
    assert not called.exists()
    with pytest.raises(BuildError, match="called"):
        RTX.build(graph, tmp_path, key="k", recipe=small("l40s"))
    assert called.exists()


@needs_rtx
def test_fp8_is_compiled_for_8_9(tmp_path: Path) -> None:
    engine = RTX.build(record(tmp_path, fp8_linear(), **SHAPES), tmp_path, key="k", recipe=small("l40s"))
    assert engine.structure is not None
    structure = json.loads((tmp_path / engine.structure.path).read_text())
    assert structure["layer_dtypes"]["FP8"] >= 2
    assert structure["layer_types"]["DEQUANTIZE"] == 2


@pytest.mark.parametrize("capability", ["8.9", "9.0", "12.0"])
def test_gpus_with_fp8(capability: str) -> None:
    check_datatypes(fp8_linear(), "transformer", replace(small("l40s"), compute_capability=capability))


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", None])
def test_gpus_without_fp8(capability: str | None) -> None:
    recipe = replace(small("l40s"), compute_capability=capability)
    check_datatypes(linear(), "transformer", recipe)
    with pytest.raises(RecipeError):
        check_datatypes(fp8_linear(), "transformer", recipe)


def test_fp8_is_found_wherever_it_is_named() -> None:
    recipe = small("a100")
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT8E5M2)
    tensor = numpy_helper.from_array(np.ones(1, ml_dtypes.float8_e4m3fn), "t")
    constant = helper.make_node("Constant", [], ["y"], value=tensor)
    branch = helper.make_graph([cast], "branch", [], [])
    inside = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT8E4M3FN, [1])
    for model in (model_of([cast], []), model_of([constant], []), model_of([inside], []), model_of([], [], value)):
        with pytest.raises(RecipeError, match="FP8"):
            check_datatypes(model, "transformer", recipe)
