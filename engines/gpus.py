"""The GPUs that CUDA offers to this process.

They are found through ``libcuda.so.1``, which comes with NVIDIA's driver. So they are those that an engine will run on:
CUDA_VISIBLE_DEVICES hides and orders them, an instance of a divided GPU (MIG) counts as one, and a container needs no
``nvidia-smi``. Within a process libcuda and the CUDA runtime number them alike, by their CUDA index. No context is
created, so no memory of a GPU is taken.

Functions, codes and attributes are those of the CUDA driver API reference (docs.nvidia.com/cuda/cuda-driver-api) and of
``cuda.h``.
"""

import contextlib
import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

__all__ = ["NO_GPU", "Driver", "Gpu", "find_driver", "libcuda"]

LIBRARY = "libcuda.so.1"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
GIB = 2**30

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED = 75, 76, 18
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR``, ``..._MINOR`` and ``CU_DEVICE_ATTRIBUTE_INTEGRATED``."""

NOT_INITIALIZED, TOO_OLD, NO_DEVICE, INVALID_DEVICE, DRIVER_MISMATCH = 3, 35, 100, 101, 803
"""``CUDA_ERROR_NOT_INITIALIZED``, which a forked process gets after its parent used CUDA, ``CUDA_ERROR_NO_DEVICE``,
``CUDA_ERROR_INVALID_DEVICE`` and ``CUDA_ERROR_SYSTEM_DRIVER_MISMATCH``."""

NO_GPU = "CUDA finds no GPU here; use a machine with an NVIDIA GPU"
"""The sentence where no other reason is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU, or an instance of one (MIG), that this process may use.

    Attributes:
        index: CUDA's number of it in this process.
        name: of the product, and of the instance.
        compute_capability: such as "8.9".
        memory_gib: None where it shares the memory of the CPU.
        uuid: by which CUDA_VISIBLE_DEVICES names it in any process and any order, "GPU-..." or "MIG-...".
        pci: address on the PCI bus, "domain:bus:device.function" in hexadecimal; None where unknown.
    """

    index: int
    name: str
    compute_capability: str
    memory_gib: float | None
    uuid: str = ""
    pci: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """NVIDIA's driver and the GPUs that it offers to this process.

    Attributes:
        gpus: by their CUDA index.
        cuda: latest CUDA that it serves, such as "12.8"; None without a driver.
        version: such as "570.86.15"; None where it is unknown.
        no_gpu: why there is no GPU, a semicolon, and the fix; None where there is one.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda: str | None = None
    version: str | None = None
    no_gpu: str | None = None


class _CudaError(Exception):
    """A call of libcuda failed: its code, and its name with that of the call."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def libcuda() -> Any:
    """The library of NVIDIA's driver.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL(LIBRARY)


def find_driver() -> Driver:
    """Ask the driver for its GPUs. Any thread may call this, as often as it likes: ``cuInit`` works once.

    It initializes CUDA for this process, and what a process forks afterwards cannot use CUDA.
    """
    try:
        library = libcuda()
    except OSError:
        return Driver(
            no_gpu=f"{LIBRARY} of NVIDIA's driver does not load here; install the driver, or start the container with "
            "GPUs"
        )
    cuda, version = _cuda_version(library), _driver_version()
    try:
        return Driver(gpus=_gpus(library), cuda=cuda, version=version)
    except _CudaError as problem:
        no_gpu = f"CUDA finds no GPU here ({problem}{_hint(problem.code)}"
    return Driver(cuda=cuda, version=version, no_gpu=no_gpu)


def _gpus(library: Any) -> tuple[Gpu, ...]:
    """The GPUs by their index, at least one."""
    _call(library, "cuInit", ctypes.c_uint(0))
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise _CudaError(NO_DEVICE, "0 from cuDeviceGetCount")
    found, last = [], _CudaError(NO_DEVICE, "0 from cuDeviceGetCount")
    for index in range(count.value):
        try:
            found.append(_gpu(library, index))
        except _CudaError as problem:  # one that fails hides no other
            last = problem
    if not found:
        raise last
    return tuple(found)


def _gpu(library: Any, index: int) -> Gpu:
    handle, size = ctypes.c_int(), ctypes.c_size_t()
    text, pci, octets = (ctypes.create_string_buffer(length) for length in (256, 32, 16))
    _call(library, "cuDeviceGet", ctypes.byref(handle), ctypes.c_int(index))
    _call(library, "cuDeviceGetName", text, ctypes.c_int(len(text)), handle)
    _call(library, "cuDeviceGetUuid_v2", octets, handle)
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(size), handle)
    with contextlib.suppress(_CudaError):  # an integrated GPU may have no address
        _call(library, "cuDeviceGetPCIBusId", pci, ctypes.c_int(len(pci)), handle)
    major, minor = (_attribute(library, what, handle) for what in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR))
    name = text.value.decode(errors="replace")
    return Gpu(
        index=index,
        name=name,
        compute_capability=f"{major}.{minor}",
        memory_gib=None if _attribute(library, INTEGRATED, handle) else round(size.value / GIB, 1),
        # of an instance the call returns the instance's own, and its name is such as "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
        uuid=f"{'MIG' if ' MIG ' in name else 'GPU'}-{UUID(bytes=octets.raw)}",
        pci=pci.value.decode(errors="replace") or None,
    )


def _attribute(library: Any, attribute: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _call(library, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), handle)
    return value.value


def _call(library: Any, name: str, *arguments: Any) -> None:
    """Call a function of libcuda, which returns a code."""
    try:
        function = getattr(library, name)
    except AttributeError:
        raise _CudaError(TOO_OLD, f"the driver lacks {name}") from None
    code = function(*arguments)
    if code:
        text = ctypes.c_char_p()
        named = hasattr(library, "cuGetErrorName")
        known = named and library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) == 0 and text.value
        raise _CudaError(code, f"{known.decode() if known else f'error {code}'} from {name}")


def _hint(code: int) -> str:
    """The end of the sentence about an error of libcuda: a likely cause, and the fix."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code == NOT_INITIALIZED:
        return (
            "), as after a fork of a process that had used CUDA; start processes with the spawn method, or before the "
            "first editor"
        )
    if code in (NO_DEVICE, INVALID_DEVICE) and visible is not None:
        return (
            f"), and CUDA_VISIBLE_DEVICES is {visible!r}; unset CUDA_VISIBLE_DEVICES, or set it to GPUs of this machine"
        )
    if code == TOO_OLD:
        return "); update the driver"
    if code == DRIVER_MISMATCH:
        return f"), since {LIBRARY} is of another version than the driver; restart the machine, or install both again"
    return "); use a machine with an NVIDIA GPU, or check its driver with `nvidia-smi`"


def _cuda_version(library: Any) -> str | None:
    """The latest CUDA that the driver serves; this call works before ``cuInit`` and without a GPU."""
    version = ctypes.c_int()
    if not hasattr(library, "cuDriverGetVersion") or library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver_version() -> str | None:
    """The version that the kernel's module reports, "NVRM version: NVIDIA UNIX ... Kernel Module  570.86.15  ..."."""
    try:
        text = DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:  # such as in WSL
        return None
    match = re.search(r"Kernel Module\s.*?(\d+\.\d[\d.]*)", text)
    return match[1] if match else None
