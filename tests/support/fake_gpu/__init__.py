"""A GPU that is none: CUDA's runtime and TensorRT as modules, over plain host memory behind invented addresses.

It does what the sessions rely on and refuses what the real ones refuse: an error code, False, None or an exception
where they answer so, ``Misuse`` where they would hang or compute from garbage, ``Device.crash`` where a destructor
would end the process. Each rule names its source, and what can be compared with the installed packages is
(tests/engines/sessions/test_bindings.py).
Work is queued and done late, as late as a wait for it
allows, so that a missing wait shows. An engine is a JSON file that names an ONNX graph, and onnxruntime executes it.

    gpu = Gpu(); gpu.install(monkeypatch, "tensorrt-rtx"); bundle = gpu.retarget(cpu_bundle, folder, "tensorrt-rtx")
"""

from tests.support.fake_gpu.config import RtxRuntimeConfig, RuntimeCache, RuntimeConfig
from tests.support.fake_gpu.context import Context, need
from tests.support.fake_gpu.cuda import runtime
from tests.support.fake_gpu.engine import Engine, RtxEngine
from tests.support.fake_gpu.gpu import Gpu
from tests.support.fake_gpu.handles import Code, Misuse
from tests.support.fake_gpu.tensorrt import RtxRuntime, Runtime, tensorrt

__all__ = [
    "Code",
    "Context",
    "Engine",
    "Gpu",
    "Misuse",
    "RtxEngine",
    "RtxRuntime",
    "RtxRuntimeConfig",
    "Runtime",
    "RuntimeCache",
    "RuntimeConfig",
    "need",
    "runtime",
    "tensorrt",
]
