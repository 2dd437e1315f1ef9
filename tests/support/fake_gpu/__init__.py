"""A GPU that is none: CUDA's runtime and TensorRT as modules, over plain host memory behind invented addresses.

It does what the sessions rely on and refuses what the real ones refuse: an error code or False where they answer so,
``Misuse`` where they would crash, hang or compute from garbage. Work is queued and done late, as late as a wait for it
allows, so that a missing wait shows. An engine is a JSON file that names an ONNX graph, and onnxruntime executes it.

    gpu = Gpu(); gpu.install(monkeypatch, "tensorrt-rtx"); bundle = gpu.retarget(cpu_bundle, folder, "tensorrt-rtx")
"""

from tests.support.fake_gpu.config import RuntimeCache, RuntimeConfig
from tests.support.fake_gpu.context import Context, need
from tests.support.fake_gpu.cuda import runtime
from tests.support.fake_gpu.engine import Engine, RtxEngine
from tests.support.fake_gpu.gpu import Gpu
from tests.support.fake_gpu.handles import Code, Misuse
from tests.support.fake_gpu.tensorrt import Runtime, tensorrt

__all__ = [
    "Code",
    "Context",
    "Engine",
    "Gpu",
    "Misuse",
    "RtxEngine",
    "Runtime",
    "RuntimeCache",
    "RuntimeConfig",
    "need",
    "runtime",
    "tensorrt",
]
