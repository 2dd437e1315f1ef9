"""The cache of kernels that TensorRT for RTX compiles."""

from pathlib import Path

import pytest

from qie.engines.sessions.device import Device
from tests.support.fake_gpu import Gpu
from tests.support.tensorrt_sessions import (
    Loop,
    record_of,
)


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_what_was_compiled_is_not_compiled_again(folder: Path, device: Device, gpu: Gpu, qie_home: Path) -> None:
    def once() -> int:
        gpu.compiled.clear()
        loop = Loop(folder, device)
        for _ in range(3):
            loop.run()
        loop.close()
        return len(gpu.compiled)

    assert once() == 1
    (file,) = (qie_home / "cache" / "tensorrt-rtx").iterdir()
    assert file.name == f"{record_of(folder, 'transformer').key[:32]}-fake-l40s.bin"
    assert once() == 0
    gpu.driver = "600.1"
    assert once() == 1  # the cache of another driver is refused
    file.write_bytes(b"damaged")
    assert once() == 1
    assert once() == 0


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_cache_that_cannot_be_written_is_no_failure(
    loop: Loop, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (qie_home / "cache").write_text("a file where a folder should be")
    loop.run()
    assert loop.results()


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_cache_that_did_not_change_is_not_written(loop: Loop, qie_home: Path) -> None:
    loop.run()
    (file,) = (qie_home / "cache" / "tensorrt-rtx").iterdir()
    file.unlink()
    loop.run()
    assert not file.exists()


def test_tensorrt_has_no_cache_of_kernels(loop: Loop, backend: str, qie_home: Path) -> None:
    loop.run()
    assert (qie_home / "cache").exists() == (backend == "tensorrt-rtx")
