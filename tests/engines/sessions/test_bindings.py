"""Every name of CUDA's and TensorRT's that the sessions use is in the installed bindings and takes what it is given.

The names are read from the sources: calls by name in cuda.py, and in tensorrt/ the attributes of the variables that
hold TensorRT's objects. A variable holds the class that ``HOLDS`` says, so ``tensorrt/`` names them alike throughout.
The fake, on which the other tests rest, must have the same names.
"""

import ast
import inspect
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qie.engines import sessions
from qie.engines.bundle.bundle import open_bundle
from qie.engines.sessions.tensorrt.contract import DTYPES, NUMPY_DTYPES
from qie.engines.sessions.tensorrt.loading import DIAGNOSES, ENGINES_FAULT
from tests.support.fake_gpu import (
    Context,
    Engine,
    Gpu,
    RtxEngine,
    RtxRuntime,
    RtxRuntimeConfig,
    Runtime,
    RuntimeCache,
    RuntimeConfig,
    runtime,
    tensorrt,
)
from tests.support.fake_gpu.types import Dims

FOLDER = Path(sessions.__file__).parent
SOURCE = "\n".join(path.read_text() for path in sorted((FOLDER / "tensorrt").glob("*.py")))
HOLDS = {
    "trt": "",
    "self._trt": "",
    "runtime": "Runtime",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self.engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "config": "IRuntimeConfig",
    "self._config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
    "context": "IExecutionContext",
}
"""Variable of tensorrt/ to the class that it holds; "" is the module."""

FAKES: dict[str, tuple[type, ...]] = {
    "Runtime": (RtxRuntime, Runtime),
    "ICudaEngine": (RtxEngine, Engine),
    "IRuntimeConfig": (RtxRuntimeConfig, RuntimeConfig),
    "IRuntimeCache": (RuntimeCache,),
    "IExecutionContext": (Context,),
}
RTX_ONLY = {"CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "EngineValidity", "load_weights"}
"""Names before whose use tensorrt/ looks whether they exist."""


class Use(NamedTuple):
    """A name as it is used: its owner's, and the number of arguments where it is called."""

    owner: str
    name: str
    arguments: int | None


def cuda_uses(source: str) -> Iterator[Use]:
    """The calls by name, and the names that ``_runtime()`` is asked for."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="_call" | "_attempt"), args=[ast.Constant(value=str(name)), *arguments]):
                yield Use("", name, len(arguments))
            case ast.Attribute(value=ast.Call(func=ast.Name(id="_runtime")), attr=name):
                yield Use("", name, None)
            case ast.Attribute(
                value=ast.Attribute(value=ast.Call(func=ast.Name(id="_runtime")), attr=owner), attr=name
            ):
                yield Use(owner, name, None)
            case ast.Attribute(value=ast.Name(id="runtime"), attr=name):
                yield Use("", name, None)


def tensorrt_uses(source: str) -> Iterator[Use]:
    """The attributes and calls of the variables in ``HOLDS``, and of the module's classes."""
    tree = ast.parse(source)
    calls = {id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    enums = {"strategy": "CudaGraphStrategy", "kinds": "DynamicShapesKernelSpecializationStrategy"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        base = ast.unparse(node.value)
        if base in HOLDS:
            yield Use(HOLDS[base], node.attr, calls.get(id(node)))
        elif base.startswith("trt."):
            yield Use(base.removeprefix("trt."), node.attr, calls.get(id(node)))
        elif base.startswith("self._trt."):
            yield Use(base.removeprefix("self._trt."), node.attr, calls.get(id(node)))
        elif base in enums:
            yield Use(enums[base], node.attr, None)


CUDA = sorted(set(cuda_uses((FOLDER / "cuda.py").read_text())), key=repr)
TENSORRT = sorted(set(tensorrt_uses(SOURCE)), key=repr)


def find(module: Any, use: Use) -> Any:
    owner = module
    for part in filter(None, use.owner.split(".")):
        owner = getattr(owner, part)
    return getattr(owner, use.name)


def numbers_of_arguments(function: Any) -> set[int]:
    """How many arguments a function of pybind11's takes, without self: its docstring has the signatures."""
    allowed: set[int] = set()
    for words in re.findall(
        rf"(?:^|\d\. )(?:{function.__name__}|__init__)\(self: [\w.]+(.*)\) -> ", function.__doc__, re.M
    ):
        names = re.findall(r", (\w+): ", words)
        optional = len(re.findall(r" = ", words))
        allowed |= set(range(len(names) - optional, len(names) + 1))
    return allowed


def test_the_walk_finds_what_there_is() -> None:
    """A walk that finds nothing would prove nothing; these are the calls on which a run rests."""
    assert {use.name for use in CUDA} >= {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamEndCapture"}
    assert set(TENSORRT) >= {
        Use("", "Runtime", 1),
        Use("Runtime", "deserialize_cuda_engine", 1),
        Use("ICudaEngine", "create_execution_context", 1),
        Use("IExecutionContext", "execute_async_v3", 1),
        Use("IExecutionContext", "set_device_memory", 2),
        Use("IExecutionContext", "set_input_shape", 2),
        Use("IExecutionContext", "set_tensor_address", 2),
        Use("IRuntimeConfig", "cuda_graph_strategy", None),
        Use("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE", None),
        Use("ExecutionContextAllocationStrategy", "USER_MANAGED", None),
    }


def test_no_object_of_tensorrt_is_used_under_another_name() -> None:
    """Names of TensorRT's classes that appear in the source appear on a variable that the walk knows."""
    module = pytest.importorskip("tensorrt_rtx")
    theirs = {
        name
        for owner in ("Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext")
        for name in dir(getattr(module, owner))
        if "_" in name and not name.startswith("_")
    }
    tree = ast.parse(SOURCE)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used & theirs == {use.name for use in TENSORRT} & theirs


@pytest.mark.parametrize("use", CUDA, ids=lambda use: f"{use.owner}.{use.name}".lstrip("."))
def test_cuda_has(use: Use) -> None:
    module = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    target = find(module, use)
    if use.arguments is not None:
        inspect.signature(target).bind(*range(use.arguments))
    if callable(target) and use.arguments is not None:
        assert callable(find(runtime(Gpu()), use)), "the fake lacks it"


@pytest.mark.parametrize("use", TENSORRT, ids=lambda use: f"{use.owner}.{use.name}".lstrip("."))
def test_tensorrt_for_rtx_has(use: Use) -> None:
    module = pytest.importorskip("tensorrt_rtx")
    target = find(module, use)
    if use.arguments is None:
        assert not inspect.isroutine(target), "a method that is not called"
    elif isinstance(target, type):
        assert use.arguments in numbers_of_arguments(target.__init__)
    else:
        assert use.arguments in numbers_of_arguments(target), target.__doc__


@pytest.mark.parametrize("use", TENSORRT, ids=lambda use: f"{use.owner}.{use.name}".lstrip("."))
def test_the_fake_of_tensorrt_has(use: Use) -> None:
    if use.owner not in FAKES:
        assert hasattr(tensorrt(Gpu(), "tensorrt_rtx", "tensorrt-rtx"), use.owner or use.name)
        return
    source = inspect.getsource(FAKES[use.owner][0]) + "".join(inspect.getsource(c) for c in FAKES[use.owner][1:])
    assert re.search(rf"\b(def {use.name}\(|self\.{use.name}\b)", source)


def test_what_tensorrt_lacks_is_looked_for() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    looked_for = {
        (HOLDS[ast.unparse(node.args[0])], ast.literal_eval(node.args[1]))
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr" and ast.unparse(node.args[0]) in HOLDS
    }
    assert looked_for == {
        ("ICudaEngine", "create_runtime_config"),
        ("Runtime", "defer_weights_loading"),
        ("Runtime", "get_engine_validity"),
        ("IRuntimeConfig", "create_runtime_cache"),
        ("IRuntimeConfig", "cuda_graph_strategy"),
        ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    }
    assert all(hasattr(getattr(module, owner), name) for owner, name in looked_for)
    assert not RTX_ONLY & set(vars(tensorrt(Gpu(), "tensorrt", "tensorrt"))) and not RTX_ONLY & set(dir(Engine))


def test_the_dtypes_have_tensorrts_names() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    for name, dtype in DTYPES.items():
        assert getattr(module.DataType, name).name == name
        assert getattr(module.DataType, name).itemsize == np.dtype(NUMPY_DTYPES[dtype]).itemsize
        if dtype != "bfloat16":  # numpy has none
            assert module.nptype(getattr(module.DataType, name)).__name__ == dtype


def test_the_fakes_enums_are_tensorrts() -> None:
    module, fake = pytest.importorskip("tensorrt_rtx"), tensorrt(Gpu(), "tensorrt_rtx", "tensorrt-rtx")
    for name in (
        "ExecutionContextAllocationStrategy",
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
    ):
        theirs = {member: int(value) for member, value in getattr(module, name).__members__.items()}
        assert {member.name: int(member) for member in getattr(fake, name)} == theirs, name


def test_every_diagnosis_is_tensorrts() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    known = set(module.EngineInvalidityDiagnostics.__members__)
    assert set(DIAGNOSES) == known - {"INSUFFICIENT_GPU_MEMORY"}  # loading says how much is missing
    assert set(ENGINES_FAULT) <= set(DIAGNOSES)


def test_what_the_real_runtime_answers_without_a_gpu() -> None:
    """The header is enough, the arguments are checked, and a refused engine is None."""
    module = pytest.importorskip("tensorrt_rtx")
    runtime = module.Runtime(module.Logger(module.Logger.INTERNAL_ERROR))
    assert runtime.engine_header_size == 64
    validity, diagnostics = runtime.get_engine_validity(b"no engine" * 100)
    assert validity == module.EngineValidity.INVALID
    assert diagnostics == int(module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        runtime.deserialize_cuda_engine(None)
    assert runtime.deserialize_cuda_engine(b"no engine" * 100) is None
    assert runtime.defer_weights_loading is False


def test_dims_without_a_rank_have_no_length() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    assert tuple(module.Dims([1, 2])) == tuple(Dims([1, 2])) == (1, 2)
    with pytest.raises(ValueError, match="should return >= 0"):
        tuple(Dims())


def test_the_callback_of_a_weak_reference_to_an_object_of_tensorrt_comes_when_it_is_gone() -> None:
    """What keeps a runtime cache alive for its contexts; pybind11's objects have no attributes to hang it on."""
    module = pytest.importorskip("tensorrt_rtx")
    owned, order = module.Runtime(module.Logger()), []
    with pytest.raises(AttributeError):
        owned.kept = None
    weakref.finalize(owned, order.append, "gone")
    assert order == []
    del owned
    assert order == ["gone"]


def test_the_fakes_codes_are_cudas() -> None:
    module = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    for code in runtime(Gpu()).cudaError_t:
        assert int(getattr(module.cudaError_t, code.name)) == code, code.name
    for name in ("cudaStreamNonBlocking", "cudaEventDisableTiming", "cudaEventBlockingSync"):
        assert getattr(module, name) == getattr(runtime(Gpu()), name)


def test_the_compiler_sees_a_graph_as_the_manifest_does(bundle: Path) -> None:
    """An engine has its network's inputs and outputs; the session compares them with the manifest in these words."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    for record in open_bundle(str(bundle)).manifest.engines:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(bundle / record.path))
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        assert [(t.name, DTYPES[t.dtype.name], tuple(t.shape)) for t in inputs] == [
            (spec.name, spec.dtype, tuple(-1 if isinstance(d, str) else d for d in spec.dims)) for spec in record.inputs
        ]
        assert [(t.name, DTYPES[t.dtype.name], len(t.shape)) for t in outputs] == [
            (spec.name, spec.dtype, len(spec.dims)) for spec in record.outputs
        ]
        assert not any(t.is_shape_tensor for t in inputs)
