"""Enums and the logger of TensorRT's modules."""

from enum import Enum

DataType = Enum("DataType", ["FLOAT", "INT64", "UINT8", "BF16"])
DTYPES = {"float32": DataType.FLOAT, "int64": DataType.INT64, "uint8": DataType.UINT8}
Strategy = Enum("Strategy", ["STATIC", "USER_MANAGED"])
CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
Specialization = Enum("Specialization", ["LAZY", "EAGER"])
Mode = Enum("Mode", ["INPUT", "OUTPUT"])
Location = Enum("Location", ["DEVICE", "HOST"])
Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])


class ILogger:
    """What an application's logger is made of."""

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def log(self, severity: Severity, text: str) -> None:
        raise NotImplementedError
