"""The report of a self-test: what was tried on the GPU, what came out, and whether that is as it should be."""

from dataclasses import dataclass
from typing import Literal

from qie.engines.machine import Machine

__all__ = ["Check", "Failed", "Report", "Result"]

Result = Literal["passed", "failed", "skipped"]


class Failed(Exception):
    """What a check raises where something is not as it should be; its text is what was found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check.

    Attributes:
        backend: that executed.
        name: what was checked.
        result: skipped is neither passed nor failed.
        found: values, or the reason of a failure or skip.
        seconds: that it took.
    """

    backend: str
    name: str
    result: Result
    found: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All checks on one GPU.

    Attributes:
        qie: version.
        machine: CPU, memory and GPUs.
        gpu: name of the GPU that was tested.
        packages: (package, version) of every package of a backend that is installed.
        checks: in the order in which they ran.
        warnings: the latest that TensorRT logged, without repetition.
    """

    qie: str
    machine: Machine
    gpu: str
    packages: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]

    def count(self, result: Result) -> int:
        """Number of checks with ``result``."""
        return sum(check.result == result for check in self.checks)
