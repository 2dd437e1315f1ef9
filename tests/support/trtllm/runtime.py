"""The package ``tensorrt_llm`` 1.2.1 for a fake GPU, as far as a session needs it.

    gpu = Gpu(); gpu.install(monkeypatch); install_runtime(gpu, monkeypatch)

It answers as runtime/session.py does: ``infer_shapes`` raises ValueError for a name or dtype and RuntimeError for a
shape, ``set_shapes`` KeyError and ValueError, ``run`` returns False where TensorRT does, and an engine that does not
load is an AttributeError of None. What the library computes garbage from, or dies of, is ``Misuse`` (engine.py).
"""

import functools
import importlib.machinery
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from qie.engines import backends
from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.tensorrt import tensorrt
from tests.support.fake_gpu.types import DataType, Mode, Severity
from tests.support.trtllm.build import MAGIC, VERSION
from tests.support.trtllm.engine import TRT, LlmContext, LlmEngine


class Runtime:
    """IRuntime, as the package uses it: with its own logger, whose errors go to stderr."""

    def __init__(self, gpu: Device, version: str) -> None:
        if gpu.device is None:
            raise Misuse("a runtime is made before a GPU is chosen")
        self.gpu, self.version = gpu, version

    def deserialize_cuda_engine(self, serialized_engine: Any) -> LlmEngine | None:
        if serialized_engine is None:
            raise TypeError("deserialize_cuda_engine(): incompatible function arguments")
        content = bytes(serialized_engine)
        if not content.startswith(MAGIC):
            return self.refuse("header.magicTag == kEXPECTED_MAGIC_TAG failed")
        start = len(MAGIC) + 8
        length = int.from_bytes(content[len(MAGIC) : start], "little")
        try:
            header = json.loads(content[start : start + length])
        except ValueError:
            return self.refuse("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed")
        expected = {"tensorrt": self.gpu.version, "capability": self.gpu.capability, "version": self.version}
        for key, value in expected.items():
            if header[key] != value:
                return self.refuse(f"{key} is {header[key]}, expected {value}")
        weights = content[start + length :]
        if self.gpu.in_use + len(weights) > self.gpu.memory_bytes:
            return self.refuse("Requested amount of GPU memory could not be allocated")
        return LlmEngine(self.gpu, self, header, weights)

    def refuse(self, text: str) -> None:
        self.gpu.refused.append(text)
        sys.stderr.write(f"[TRT] [{Severity.ERROR.name[0]}] {text}\n")


@dataclass
class TensorInfo:
    """``tensorrt_llm.runtime.TensorInfo``."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]


class Session:
    """``tensorrt_llm.runtime.Session`` on the fake GPU that ``install_runtime`` chose."""

    gpu: Device
    version: str

    def __init__(self, **_: Any) -> None:
        self.runtime: Any = None
        self.engine: Any = None
        self.context: Any = None

    @classmethod
    def from_serialized_engine(cls, engine: Any) -> "Session":
        session = cls()
        session.runtime = Runtime(cls.gpu, cls.version)
        session.engine = session.runtime.deserialize_cuda_engine(engine)
        return session._prepared()

    @classmethod
    def from_engine(cls, engine: Any) -> "Session":
        session = cls()
        session.engine = engine
        return session._prepared()

    def _prepared(self) -> "Session":
        self.context = self.engine.create_execution_context()
        self.context.set_optimization_profile_async(0, 0)
        return self

    def set_shapes(self, tensor_dict: Mapping[str, Any], context: LlmContext | None = None) -> None:
        context = context or self.context
        for name in self.engine.inputs:
            shape = tensor_dict[name].shape
            if not context.set_input_shape(name, shape):
                ranges = [tuple(each) for each in self.engine.get_tensor_profile_shape(name, 0)]
                raise ValueError(f"Couldn't assign {name} with shape {shape}, engine supports {ranges}")

    def infer_shapes(self, inputs: Sequence[TensorInfo], context: LlmContext | None = None) -> list[TensorInfo]:
        context = context or self.context
        for info in inputs:
            if self.engine.get_tensor_mode(info.name) is not Mode.INPUT:
                raise ValueError(f"Tensor:{info.name} is not an input tensor")
            if self.engine.get_tensor_dtype(info.name) != info.dtype:
                raise ValueError(f"Tensor:{info.name} has wrong dtype")
            if not context.set_input_shape(info.name, info.shape):
                raise RuntimeError(
                    f"Could not set shape {info.shape} for tensor {info.name}. "
                    "Please check the profile range for which your model was build."
                )
        return [
            TensorInfo(name, self.engine.get_tensor_dtype(name), tuple(context.get_tensor_shape(name)))
            for name in self.engine.outputs
        ]

    def run(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], stream: Any, context: LlmContext | None = None
    ) -> bool:
        """Addresses are integers; the real one also takes tensors of torch."""
        context = context or self.context
        for name, memory in {**inputs, **outputs}.items():
            if not isinstance(memory, int):
                raise TypeError("set_tensor_address(): incompatible function arguments")
            context.set_tensor_address(name, memory)
        return context.execute_async_v3(stream)


def install_runtime(gpu: Device, monkeypatch: pytest.MonkeyPatch, version: str = VERSION) -> ModuleType:
    """Put ``tensorrt_llm`` and the ``tensorrt`` that it needs, both for ``gpu``, in the place of real ones."""
    package, runtime, utils = (ModuleType(f"tensorrt_llm{part}") for part in ("", ".runtime", "._utils"))
    session = type("Session", (Session,), {"gpu": gpu, "version": version})
    vars(runtime).update(Session=session, TensorInfo=TensorInfo)
    vars(utils).update(str_dtype_to_trt=TRT.__getitem__)
    vars(package).update(__version__=version, runtime=runtime, _utils=utils, __path__=[])
    for module in (package, runtime, utils, tensorrt(gpu, "tensorrt", "tensorrt")):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "installed", functools.partial(_installed, backends.installed))
    return package


def _installed(before: Any, module: str) -> bool:
    return module in ("tensorrt", "tensorrt_llm") or before(module)
