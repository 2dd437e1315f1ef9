from collections.abc import Iterator

import pytest

from tests.support.fake_gpu import Gpu


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A fake GPU with the backend's module."""
    gpu = Gpu()
    gpu.install(monkeypatch, backend)
    return gpu


@pytest.fixture
def plain_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A fake GPU with CUDA alone; a test must leave no memory behind."""
    gpu = Gpu()
    gpu.install(monkeypatch)
    yield gpu
    assert gpu.in_use == 0
