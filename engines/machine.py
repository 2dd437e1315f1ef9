"""The machine at hand: CPU, memory, GPUs and installed packages. Nothing heavy is imported."""

import contextlib
import ctypes
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["GIB", "Gpu", "Machine", "memory_bytes", "this_machine", "version_of"]

GIB = 2**30
"""Bytes of a GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """An NVIDIA GPU of this machine, as its driver reports it.

    Attributes:
        name: of the product.
        compute_capability: such as "8.9".
        memory_gib: None where it shares the memory of the CPU.
        driver: version of the driver.
    """

    name: str
    compute_capability: str
    memory_gib: float | None
    driver: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine.

    Attributes:
        system: name and release of the operating system.
        cpu: name of the CPU.
        cores: that this process may use.
        memory_gib: that this process may use: of the machine, or of its container.
        gpus: its NVIDIA GPUs.
        cuda: latest CUDA that the driver serves; None without a driver.
    """

    system: str
    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[Gpu, ...]
    cuda: str | None = None


def this_machine() -> Machine:
    """Examine this machine; without a driver it has no GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=_cpu(),
        cores=cores,
        memory_gib=round(memory_bytes() / GIB, 1),
        gpus=_gpus(),
        cuda=_cuda(),
    )


def memory_bytes(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or less by its control group (v2, v1) or address space limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _limit_files(control_groups):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            limits.append(int(file.read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits)


def _limit_files(control_groups: Path) -> list[Path]:
    """The memory limits of this process's control group and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    files = [control_groups / "memory.max", control_groups / "memory" / "memory.limit_in_bytes"]
    for line in lines:  # "0::/user.slice/x.scope" (v2), "5:memory:/docker/x" (v1)
        _, controllers, group = line.split(":", 2)
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(1, len(parts) + 1):
            inner = Path(*parts[:depth])
            if not controllers:
                files.append(control_groups / inner / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(control_groups / "memory" / inner / "memory.limit_in_bytes")
    return files


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run([command, *query], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    return tuple(
        Gpu(
            name=name,
            compute_capability=capability,
            memory_gib=round(int(mib) / 1024, 1) if mib.isdigit() else None,
            driver=driver,
        )
        for name, capability, mib, driver in rows
    )


def _cuda() -> str | None:
    """The latest CUDA that the driver serves, for example "12.8"; None without a driver."""
    version = ctypes.c_int(0)
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if code else f"{version.value // 1000}.{version.value % 1000 // 10}"
