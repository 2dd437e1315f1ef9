"""A bundle for the fake GPU, the device, and a transformer in a loop."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from qie.engines.sessions.device import Device
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
    device = Device(gpu.capability)
    yield device
    if gpu.broken is None:
        gc.collect()
        device.close()
        assert gpu.blocks == {}


@pytest.fixture
def loop(folder: Path, device: Device) -> Iterator[Loop]:
    loop = Loop(folder, device)
    yield loop
    if loop.inputs:
        loop.close()
