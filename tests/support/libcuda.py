"""The functions of libcuda that tell what the driver serves and which GPUs there are, of a made-up machine."""

from typing import Any

__all__ = ["Driver"]


class Driver:
    """libcuda of a machine with GPUs of these compute capabilities."""

    def __init__(self, cuda: str, *capabilities: str, broken: int = 0) -> None:
        self.cuda, self.capabilities, self.broken = cuda, capabilities, broken

    def cuInit(self, flags: int) -> int:
        return self.broken

    def cuDriverGetVersion(self, version: Any) -> int:
        major, minor = map(int, self.cuda.split("."))
        version._obj.value = 1000 * major + 10 * minor
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 100 + index
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = int(self.capabilities[device - 100].split(".")[{75: 0, 76: 1}[attribute]])
        return 0
