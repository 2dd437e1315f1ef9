"""A stand-in for NVIDIA's driver library, with GPUs that a test names.

``libcuda.c`` is compiled where there is a C compiler, and loaded by ctypes as the real library is. ``Libcuda`` is the
same in Python, for machines without a compiler and for the fake GPU. The C file names the rules and their sources.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

__all__ = ["NAMES", "Libcuda", "StandIn", "compile_library", "made_up_uuid"]

SOURCE = Path(__file__).with_name("libcuda.c")
NAMES = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    3: b"CUDA_ERROR_NOT_INITIALIZED",
    100: b"CUDA_ERROR_NO_DEVICE",
    101: b"CUDA_ERROR_INVALID_DEVICE",
    803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
}


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A GPU of the stand-in."""

    name: str
    capability: str
    bytes: int = 48 << 30
    integrated: int = 0
    pci: str = "0000:01:00.0"
    uuid: str = "GPU-00000000-0000-4000-8000-000000000000"

    @property
    def row(self) -> str:
        """As ``STANDIN_GPUS`` has it."""
        major, minor = self.capability.split(".")
        return f"{self.name}|{major}|{minor}|{self.bytes}|{self.integrated}|{self.pci}|{self.uuid}"


def made_up_uuid(number: int, kind: str = "GPU") -> str:
    """The UUID of a GPU, or of an instance of one with the kind "MIG"."""
    return f"{kind}-{UUID(int=number << 64 | 0xF00D)}"


def compile_library(folder: Path) -> Path | None:
    """The C stand-in as a shared library in ``folder``; None where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return library


class Libcuda:
    """The stand-in in Python; a call takes ctypes' objects, as a function of a ``ctypes.CDLL`` does."""

    def __init__(self, gpus: Sequence[StandIn], *, cuda: int = 12080, init: int = 0) -> None:
        self._all, self._cuda, self._init = list(gpus), cuda, init
        self._visible: list[StandIn] = []
        self._process: int | None = None

    def cuInit(self, flags: Any) -> int:
        if flags.value:
            return 1
        if self._process not in (None, os.getpid()):
            return 3
        if self._init:
            return self._init
        if self._process is None:
            order = os.environ.get("CUDA_DEVICE_ORDER")
            gpus = sorted(self._all, key=lambda gpu: gpu.pci) if order == "PCI_BUS_ID" else self._all
            self._visible = _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
            if not self._visible:
                return 100
            self._process = os.getpid()
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._cuda
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        if self._process != os.getpid():
            return 3
        count._obj.value = len(self._visible)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        return self._set(ordinal, device, lambda gpu: ordinal.value)

    def cuDeviceGetName(self, name: Any, length: Any, device: Any) -> int:
        return self._write(device, name, length, lambda gpu: gpu.name)

    def cuDeviceGetPCIBusId(self, address: Any, length: Any, device: Any) -> int:
        if length.value < 13:
            return 1
        return self._write(device, address, length, lambda gpu: gpu.pci)

    def cuDeviceGetUuid_v2(self, octets: Any, device: Any) -> int:
        if code := self._check(device):
            return code
        octets.raw = UUID(self._visible[device.value].uuid[4:]).bytes
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        return self._set(device, size, lambda gpu: gpu.bytes)

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        facts = {
            75: lambda gpu: int(gpu.capability.split(".")[0]),
            76: lambda gpu: int(gpu.capability.split(".")[1]),
            18: lambda gpu: gpu.integrated,
        }
        return self._set(device, value, facts[attribute.value]) if attribute.value in facts else 1

    def cuGetErrorName(self, code: Any, name: Any) -> int:
        name._obj.value = NAMES.get(code.value)
        return 0 if code.value in NAMES else 1

    def _check(self, device: Any) -> int:
        if self._process != os.getpid():
            return 3
        return 0 if 0 <= device.value < len(self._visible) else 101

    def _set(self, device: Any, result: Any, fact: Any) -> int:
        if code := self._check(device):
            return code
        result._obj.value = fact(self._visible[device.value])
        return 0

    def _write(self, device: Any, buffer: Any, length: Any, fact: Any) -> int:
        if code := self._check(device):
            return code
        buffer.value = fact(self._visible[device.value]).encode()[: length.value - 1]
        return 0


def _visible(gpus: list[StandIn], listed: str | None) -> list[StandIn]:
    if listed is None:
        return gpus
    found = []
    for entry in listed.split(","):
        named = [gpu for number, gpu in enumerate(gpus) if entry.strip() == str(number) or entry == gpu.uuid]
        if not named:
            break
        found.append(named[0])
    return found
