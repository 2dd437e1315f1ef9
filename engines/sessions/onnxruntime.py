"""Engines that onnxruntime executes: ONNX graphs with their weights beside them, on a CPU or a GPU."""

import contextlib
import ctypes
import io
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qie.engines.backends import EXPANDED_ON_CPU
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BundleError, EngineError, EngineMismatchError, first_line
from qie.engines.files import qie_home
from qie.engines.sessions.session import Tensor

__all__ = ["OnnxRuntimeSession", "preload_cuda", "session_options"]

BFLOAT16 = 16
"""ONNX's number of the type, which NumPy lacks (onnx.proto, TensorProto.DataType)."""

DTYPES: dict[str, type[np.generic] | int] = {
    "float32": np.float32,
    "bfloat16": BFLOAT16,
    "int64": np.int64,
    "uint8": np.uint8,
}

Provider = tuple[str, dict[str, str]]

LIBRARIES = re.compile(rb"libnv(?:infer|onnxparser)\.so\.\d+")
"""Names of the libraries of TensorRT in a library that is linked to them."""


class OnnxRuntimeSession:
    """One ONNX graph loaded by onnxruntime.

    Inputs and outputs are bound by address (IO binding): on a CPU a run reads and writes the caller's memory
    and copies nothing, on a GPU tensors are in its memory. Weights are mapped from the bundle; onnxruntime keeps a
    copy of those of products in the layout of its CPU kernels.
    """

    rebinds = True  # another binding is another address

    def __init__(self, folder: Path, engine: EngineRecord, *, threads: int = 0, device: int = 0) -> None:
        """Load ``engine`` of the bundle ``folder``.

        Args:
            folder: of the bundle.
            engine: of the bundle.
            threads: on the CPU; 0 for one per core.
            device: index of the GPU, in the order of CUDA, for an engine that is built for one.

        Raises:
            BundleError: onnxruntime cannot load the graph.
            EngineMismatchError: the engine is for a GPU, and onnxruntime can only use the CPU.
        """
        self._engine = engine
        self._outputs = {spec.name: spec for spec in engine.outputs}
        self._device = "cpu" if engine.compute_capability == "cpu" else "cuda"
        self._index = device if self._device == "cuda" else 0
        options = session_options(engine, threads=threads)
        providers = [("CPUExecutionProvider", {})] if self._device == "cpu" else _gpu_providers(engine, device)
        try:  # without the fallback of the Python package, which prints to stdout
            self._session = ort.InferenceSession(
                str(folder / engine.path), options, providers=providers, enable_fallback=0
            )
        except Exception as problem:
            raise BundleError(
                f"onnxruntime {ort.__version__} cannot load {folder / engine.path} ({first_line(problem)}); "
                "build the bundle again with `qie build`"
            ) from problem
        if self._session.get_providers()[0] not in [name for name, _ in providers]:
            raise EngineMismatchError(
                f"onnxruntime {ort.__version__} cannot use the GPU for {engine.component} and would use the CPU; "
                "install CUDA and cuDNN beside it with `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
            )

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor over the memory of ``array`` where that is the host's and contiguous, else a copy."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, self._index)

    def empty(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """A tensor for the output ``name`` where ``sizes`` gives the free dims."""
        spec = self._outputs[name]
        shape, dtype = list(spec.shape(sizes)), DTYPES[spec.dtype]
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, self._index)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy within the memory of the CPU or GPU."""
        target.update_inplace(source.numpy() if self._device == "cpu" else source)

    def download(self, tensor: Tensor) -> NDArray[np.generic]:
        """The content of ``tensor``."""
        array: NDArray[np.generic] = tensor.numpy()
        return array

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of ``tensor``."""
        return tuple(tensor.shape())

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute ``outputs`` from ``inputs`` in place.

        Raises:
            EngineError: onnxruntime failed or ran out of memory.
        """
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, tensor)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as problem:
            raise EngineError(
                f"onnxruntime failed in {self._engine.component} ({first_line(problem)}); "
                "use a smaller size or fewer images",
                option="size",
            ) from problem

    def unload(self) -> bool:
        """False: onnxruntime releases the weights with the graph alone."""
        return False

    def close(self) -> None:
        """Release the graph and its weights."""
        del self._session


def session_options(engine: EngineRecord, *, threads: int = 0) -> Any:
    """The ``SessionOptions`` with which the graph of ``engine`` runs, on ``threads`` of the CPU; 0 for one per core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # threads that spin after a run would keep cores from the next session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # inputs of products whose weights alone are quantized stay in float32: the default rounds them to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if engine.compute_capability == "cpu":
        # one arena for all sessions, which grows by what is asked for: else each session keeps twice its peak
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        if engine.quantization is not None and engine.quantization.scheme in EXPANDED_ON_CPU:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@cache
def _share_arena() -> None:
    """Register the memory arena that the sessions of this process share."""
    # no limit; kSameAsRequested; defaults of the rest (onnxruntime_c_api.h, CreateArenaCfgV2)
    arena = {"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg(arena))


def _gpu_providers(engine: EngineRecord, device: int) -> list[Provider]:
    """The providers of onnxruntime-gpu for ``engine`` on the GPU ``device``, in order of preference.

    TensorRT is used where the engine has profiles, without which it would compile again for every size, and where the
    version that onnxruntime is linked to is installed. Compiled engines are cached in ``qie_home()``. cuDNN chooses
    convolutions by its heuristic: to measure all of them takes time and memory at every new size.
    """
    preload_cuda()
    index = {"device_id": str(device)}
    providers: list[Provider] = [("CUDAExecutionProvider", index | {"cudnn_conv_algo_search": "HEURISTIC"})]
    if engine.profiles and _tensorrt_loads():
        folder = qie_home() / "cache" / "onnxruntime" / engine.key[:32]
        folder.mkdir(parents=True, exist_ok=True)
        ranges = {
            f"trt_profile_{kind}_shapes": ",".join(
                f"{p.input}:{'x'.join(str(dim) for dim in getattr(p, kind))}" for p in engine.profiles
            )
            for kind in ("min", "opt", "max")
        }
        cached = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
        bf16 = {"trt_bf16_enable": "1"} if engine.precision == "bfloat16" else {}
        providers.insert(0, ("TensorrtExecutionProvider", index | ranges | cached | bf16))
    return providers


def preload_cuda() -> None:
    """Load the libraries of CUDA and cuDNN that are installed as packages, for onnxruntime to find them."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _tensorrt_loads() -> bool:
    """Whether the libraries of TensorRT load to which onnxruntime's provider is linked."""
    provider = Path(ort.__file__).with_name("capi") / "libonnxruntime_providers_tensorrt.so"
    if not provider.is_file():
        return False
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import_module("tensorrt")  # loads the libraries of its package, which the system does not find by their names
    try:
        for name in set(LIBRARIES.findall(provider.read_bytes())):
            ctypes.CDLL(name.decode())
    except OSError:
        return False
    return True
