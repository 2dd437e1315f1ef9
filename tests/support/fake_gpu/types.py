"""Enums, dims and the logger of TensorRT's modules.

Members and values are those of the installed tensorrt_rtx (tests/engines/sessions/test_bindings.py compares them).
"""

from enum import Enum, IntEnum
from typing import Any

DataType = Enum("DataType", ["FLOAT", "INT64", "UINT8", "BF16", "INT32", "HALF"])
DTYPES = {
    "float32": DataType.FLOAT,
    "int64": DataType.INT64,
    "uint8": DataType.UINT8,
    "bfloat16": DataType.BF16,
}
Strategy = IntEnum("Strategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"], start=0)
CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"], start=0)
Specialization = IntEnum("Specialization", ["LAZY", "EAGER", "NONE"], start=0)
EngineValidity = IntEnum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"], start=0)
EngineInvalidityDiagnostics = IntEnum(
    "EngineInvalidityDiagnostics",
    {
        "VERSION_MISMATCH": 1,
        "UNSUPPORTED_CC": 2,
        "OLD_CUDA_DRIVER": 4,
        "OLD_CUDA_RUNTIME": 8,
        "INSUFFICIENT_GPU_MEMORY": 16,
        "MALFORMED_ENGINE": 32,
        "CUDA_ERROR": 64,
    },
)
Mode = Enum("Mode", ["INPUT", "OUTPUT"])
Location = Enum("Location", ["DEVICE", "HOST"])
Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)


class Dims:
    """Dims: a sequence, which has no length where the name is unknown (nbDims is -1: NvInferRuntimeBase.h, Dims64)."""

    def __init__(self, values: Any = None) -> None:
        self._values = None if values is None else tuple(values)

    def __len__(self) -> int:
        return -1 if self._values is None else len(self._values)  # ValueError, as in pybind11

    def __getitem__(self, index: int) -> int:
        assert self._values is not None
        return self._values[index]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other

    __hash__ = None  # type: ignore[assignment]


class ILogger:
    """What an application's logger is made of."""

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

    def log(self, severity: Severity, text: str) -> None:
        raise NotImplementedError


def address(value: Any) -> int:
    """An argument of type ``typing.SupportsInt``: pybind11 refuses what is none with a TypeError."""
    if isinstance(value, (str, bytes, type(None))):
        raise TypeError(f"incompatible function arguments: {value!r}")
    return int(value)
