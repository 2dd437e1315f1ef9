"""A pytest plugin that runs tests/gpu/trtllm on the fake GPU, with the stand-ins of trtllm-build and of its runtime.

PYTHONPATH=. pytest -p tests.support.trtllm.plugin tests/gpu/trtllm

Two things differ beside them. TensorRT's compiler is replaced by a writer of engines that the fake GPU executes with
onnxruntime, which has no bfloat16 on a CPU: the components but the language model are in float32. The model is
smaller.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends.tensorrt.builder import TensorRT
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, GraphRecord, file_record
from tests.support import gpu_bundles
from tests.support.fake_gpu import Gpu
from tests.support.trtllm.bundles import install

GPU = Gpu()
FLOAT32 = "".join(
    f'\n[components.{component}]\nprecision = "float32"\n' for component in COMPONENTS if component != "language"
)


def build(builder: TensorRT, graph: GraphRecord, folder: Path, *, key: str, recipe: Recipe, **_: Any) -> EngineRecord:
    """Replace ``TensorRT.build``: the engine names a copy of the graph, which the bundle does not keep."""
    kept = Path(PLACE.name) / key
    if not kept.exists():
        kept.mkdir()
        for file in graph.files:
            shutil.copyfile(folder / file.path, kept / file.path)
    engine = folder / f"{graph.component}.engine"
    engine.write_text(GPU.content(graph, kept / graph.path, builder.backend, graph.profiles))
    return EngineRecord(
        component=graph.component,
        backend=builder.backend,
        compute_capability=str(recipe.compute_capability),
        backend_version=builder.version(),
        precision=graph.precision,
        key=key,
        path=engine.name,
        files=(file_record(folder, engine.name),),
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters,
        quantization=graph.quantization,
        build_seconds=0.0,
        build_peak_bytes=0,
        profiles=graph.profiles,
    )


def noisy(load: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the package that warns of what qie cannot change, as the real one's imports do."""

    def call(*arguments: Any) -> Any:
        warnings.warn("of a package that TensorRT-LLM imports", DeprecationWarning, stacklevel=2)
        return load(*arguments)

    return call


def pytest_unconfigure() -> None:
    PLACE.cleanup()


PLACE = tempfile.TemporaryDirectory()
patch = pytest.MonkeyPatch()
install(GPU, patch, Path(PLACE.name) / "bin")
patch.setattr(TensorRT, "build", build)
session = import_module("tensorrt_llm.runtime").Session
patch.setattr(session, "from_serialized_engine", staticmethod(noisy(session.from_serialized_engine)))
narrow = {"text_hidden_size": 256, "text_layers": 2, "text_heads": 2, "text_kv_heads": 1, "text_intermediate_size": 256}
others = {"num_layers": 1, "vision_depth": 1, "vision_fullatt_block_indexes": (0,)}
patch.setattr(gpu_bundles, "HEADS", replace(gpu_bundles.HEADS, **narrow, **others))
patch.setattr(gpu_bundles, "RECIPE", f"{gpu_bundles.RECIPE}{FLOAT32}")
