"""The cache of kernels that TensorRT for RTX compiles."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qie.engines.sessions.device import Device, DeviceOptions
from tests.support.fake_gpu import Gpu, RtxRuntimeConfig, RuntimeCache
from tests.support.tensorrt_sessions import (
    TRANSFORMER,
    Loop,
    record_of,
)


@pytest.fixture
def device(gpu: Gpu) -> Iterator[Device]:
    """A device whose engines compile kernels for every new shape."""
    device = Device(gpu.capability, DeviceOptions(specialization="eager"))
    yield device
    assert gpu.crashes == []


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_nothing_is_compiled_for_a_new_shape_unless_asked(folder: Path, gpu: Gpu) -> None:
    for tokens in (5, 9):
        sizes = TRANSFORMER | {"text_tokens": tokens, "tokens": 36 + tokens}
        loop = Loop(folder, Device(gpu.capability), sizes)
        loop.run()
        loop.close()
    assert gpu.compiled == []


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_the_cache_is_serialized_for_a_new_shape_and_at_the_end(loop: Loop, gpu: Gpu) -> None:
    def serialized() -> int:
        return gpu.log.count(("serialize cache", None))

    for _ in range(3):
        loop.run()
    assert serialized() == 1
    others = {name: loop.session.upload(array) for name, array in loop.arrays.items()}
    loop.session.run(others, loop.outputs)
    assert serialized() == 1, "other tensors of the same shapes compile nothing"
    others.clear()
    loop.close()
    assert serialized() == 2


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_cache_of_which_tensorrt_gives_nothing(loop: Loop, gpu: Gpu, qie_home: Path) -> None:
    gpu.fingerprintless = True
    loop.run()
    assert loop.results()
    assert not (qie_home / "cache").exists()


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
@pytest.mark.parametrize(
    ("owner", "name", "problem"),
    [
        (RuntimeCache, "serialize", RuntimeError("of the library")),
        (RuntimeCache, "deserialize", RuntimeError("of the library")),
        (RtxRuntimeConfig, "create_runtime_cache", RuntimeError("of the library")),
        (RtxRuntimeConfig, "create_runtime_cache", None),
    ],
)
def test_a_cache_that_fails_costs_time_and_no_edit(
    folder: Path, device: Device, owner: Any, name: str, problem: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        if problem is not None:
            raise problem

    Loop(folder, device).close()
    monkeypatch.setattr(owner, name, fail)
    loop = Loop(folder, device)
    loop.run()
    assert loop.results()
    loop.close()


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_without_a_home_or_with_a_link_that_leads_nowhere_kernels_are_not_kept(
    folder: Path, device: Device, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Loop(folder, device)
    first.run()
    first.close()
    (file,) = (qie_home / "cache" / "tensorrt-rtx").iterdir()
    file.unlink()
    file.symlink_to(file.name)
    loop = Loop(folder, device)
    loop.run()
    assert loop.results()
    loop.close()
    for name in ("QIE_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    loop = Loop(folder, device)
    loop.run()
    assert loop.results()
    loop.close()


def nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_cache_that_did_not_change_is_not_written(loop: Loop, qie_home: Path) -> None:
    loop.run()
    (file,) = (qie_home / "cache" / "tensorrt-rtx").iterdir()
    file.unlink()
    loop.run()
    loop.close()
    assert not file.exists()


def test_tensorrt_has_no_cache_of_kernels(loop: Loop, backend: str, qie_home: Path) -> None:
    loop.run()
    assert (qie_home / "cache").exists() == (backend == "tensorrt-rtx")
