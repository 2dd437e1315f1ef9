"""A bundle for the fake GPU, the device, and a transformer in a loop."""

import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qie.engines.errors import EngineError
from qie.engines.sessions.device import Device, DeviceOptions
from tests.support.fake_gpu import Gpu
from tests.support.tensorrt_sessions import (
    Loop,
)


@pytest.fixture
def folder(gpu: Gpu, bundle: Path, tmp_path: Path, backend: str) -> Path:
    return gpu.retarget(bundle, tmp_path / "gpu", backend)


@pytest.fixture
def device(gpu: Gpu) -> Iterator[Device]:
    """A device; whatever a test did on it, nothing is left when it is closed."""
    device = Device(gpu.capability, DeviceOptions(cuda_graphs=True))
    yield device
    gc.collect()
    with suppress(EngineError):  # of a GPU that a test has broken
        device.close()
    if gpu.broken is None:
        assert gpu.blocks == {}
    assert gpu.crashes == []


@pytest.fixture
def loop(folder: Path, device: Device) -> Iterator[Loop]:
    loop = Loop(folder, device)
    yield loop
    if loop.inputs:
        loop.close()
