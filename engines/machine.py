"""The machine at hand: CPU, memory, GPUs and installed packages. Nothing heavy is imported."""

import contextlib
import ctypes
import os
import platform
import resource
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qie.engines.errors import EngineMismatchError
from qie.engines.gpus import NO_GPU, Gpu, find_driver

__all__ = [
    "GIB",
    "Machine",
    "absent_gpu",
    "choose_gpu",
    "cores",
    "cpu_name",
    "gpu_misfit",
    "memory_bytes",
    "release_memory",
    "this_machine",
    "version_of",
]

GIB = 2**30
"""Bytes of a GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine.

    Attributes:
        system: name and release of the operating system.
        cpu: name of the CPU.
        cores: that this process may use.
        memory_gib: that this process may use: of the machine, or of its container.
        gpus: NVIDIA GPUs that this process may use, by their CUDA index.
        cuda: latest CUDA that the driver serves; None without a driver.
        driver: version of the driver; None where it is unknown.
        no_gpu: where there is no GPU, why, a semicolon, and the fix.
    """

    system: str
    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[Gpu, ...]
    cuda: str | None = None
    driver: str | None = None
    no_gpu: str | None = NO_GPU


def this_machine() -> Machine:
    """Examine this machine; without a driver it has no GPU."""
    driver = find_driver()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        cpu=cpu_name(),
        cores=cores(),
        memory_gib=round(memory_bytes() / GIB, 1),
        gpus=driver.gpus,
        cuda=driver.cuda,
        driver=driver.version,
        no_gpu=driver.no_gpu,
    )


def choose_gpu(machine: Machine, compute_capability: str, device: int | None = None) -> Gpu:
    """The GPU for engines of ``compute_capability``: the one with the CUDA index ``device``, else the first that fits.

    Free memory does not count: CUDA reports it only in a context, which takes memory of every GPU that is asked.

    Raises:
        EngineMismatchError: there is no such GPU, or it has another compute capability.
    """
    misfit = gpu_misfit(machine, compute_capability, device)
    if misfit is not None:
        raise EngineMismatchError(
            f"the engines are built for compute capability {compute_capability}, and {misfit}",
            option=None if device is None else "device",
        )
    return next(gpu for gpu in machine.gpus if _fits(gpu, compute_capability, device))


def gpu_misfit(machine: Machine, compute_capability: str, device: int | None = None) -> str | None:
    """Why ``choose_gpu`` finds no GPU, a semicolon, and the fix; None where it finds one."""
    if any(_fits(gpu, compute_capability, device) for gpu in machine.gpus):
        return None
    absent = absent_gpu(machine, device)
    if absent is not None:
        return absent
    if device is None:
        names = ", ".join(dict.fromkeys(f"{gpu.name} ({gpu.compute_capability})" for gpu in machine.gpus))
        return f"this machine has {names}; build for that GPU with a recipe of `qie recipes`"
    chosen = next(gpu for gpu in machine.gpus if gpu.index == device)
    fitting = [f"GPU {gpu.index}" for gpu in machine.gpus if gpu.compute_capability == compute_capability]
    fix = f"choose {' or '.join(fitting)}" if fitting else "build for that GPU with a recipe of `qie recipes`"
    return f"GPU {device} is {chosen.name} ({chosen.compute_capability}); {fix}"


def absent_gpu(machine: Machine, device: int | None) -> str | None:
    """Why there is no GPU with the CUDA index ``device``, or none at all, and the fix; None where there is."""
    if not machine.gpus:
        return machine.no_gpu
    if any(device in (None, gpu.index) for gpu in machine.gpus):
        return None
    listed = ", ".join(f"GPU {gpu.index} is {gpu.name}" for gpu in machine.gpus)
    return f"there is no GPU {device}, where {listed}; choose one of these"


def _fits(gpu: Gpu, compute_capability: str, device: int | None) -> bool:
    return gpu.compute_capability == compute_capability and device in (None, gpu.index)


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


def release_memory() -> None:
    """Give the system what was freed and stays with the process, as between arrays that are in use: malloc_trim(3).

    Only the GNU C library has it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The name of the CPU."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
