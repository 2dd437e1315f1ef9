"""Memory: the arena, weights, profiles and weight streaming."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from qie.engines.errors import EngineError, RequestError
from qie.engines.machine import GIB
from qie.engines.sessions.device import Device, DeviceOptions
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.fake_gpu import Context, Engine, Gpu, RtxEngine, need
from tests.support.tensorrt_sessions import (
    Loop,
    change_file,
    on_cpu,
    run,
    same,
    values,
)


def largest(loop: Loop) -> int:
    limits = {p.input: p.max for p in loop.record.profiles}
    return need({name: limits.get(name, a.shape) for name, a in loop.arrays.items()})


def test_the_arena_is_reserved_once_for_the_largest_run(loop: Loop, device: Device) -> None:
    loop.run()
    assert device.arena.size == largest(loop)


def test_the_arena_is_reserved_for_engines_to_come(folder: Path, gpu: Gpu) -> None:
    device = Device(gpu.capability, DeviceOptions(arena_bytes=70_000_000))
    loop = Loop(folder, device)
    loop.run()
    assert device.arena.size == 70_000_000
    loop.close()
    device.close()


def test_an_arena_without_room_for_the_largest_run_has_what_this_one_needs(
    loop: Loop, device: Device, gpu: Gpu
) -> None:
    needed = need({name: array.shape for name, array in loop.arrays.items()})
    gpu.memory_bytes = gpu.in_use + needed
    loop.run()
    assert device.arena.size == needed
    assert loop.results()


def test_the_largest_need_is_the_rule_where_tensorrt_says_none(
    loop: Loop, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "update_device_memory_size_for_shapes", lambda self: 0)
    loop.run()
    assert device.arena.size == largest(loop)


def test_closing_gives_the_weights_back(folder: Path, device: Device, gpu: Gpu) -> None:
    loop = Loop(folder, device)
    for _ in range(3):
        loop.run()
    weights = json.loads((folder / "transformer.engine").read_text())["weights"]
    before = gpu.in_use
    loop.session.close()
    gc.collect()
    assert gpu.in_use == before - weights
    loop.inputs.clear()
    loop.outputs.clear()


def test_the_profile_that_fits_is_chosen(folder: Path, device: Device, gpu: Gpu, bundle: Path) -> None:
    dims = [1, 1, 1, 64], [1, 1, 1, 64], [1, 3, 3, 64]
    wide = [1, 4, 4, 64], [1, 4, 4, 64], [2, 9, 9, 64]
    record = change_file(folder, "vae_decoder", profiles=[{"latents": dims}, {"latents": wide}])
    session = TensorRtSession(folder, record, device)
    for batch, rows, columns in ((1, 2, 3), (2, 4, 6), (1, 9, 4), (1, 3, 3)):
        sizes = {"batch": batch, "rows": rows, "columns": columns, "height": rows * 16, "width": columns * 16}
        arrays = values(record.inputs, sizes)
        assert same(run(session, arrays, sizes, record.outputs), on_cpu(bundle, "vae_decoder", arrays, sizes))
    latents = session.upload(np.zeros((1, 3, 4, 64), np.float32))
    image = session.empty("image", {"batch": 1, "height": 48, "width": 64})
    with pytest.raises(RequestError) as problem:
        session.run({"latents": latents}, {"image": image})
    message = str(problem.value)
    assert message.startswith("latents of vae_decoder is 1x3x4x64, expected 1x1x1x64 to 1x3x3x64; use another size")
    del latents, image
    session.close()


# Weight streaming

STREAMABLE = 20_000_000_000


def streamed(folder: Path, gpu: Gpu, device: Device, free: int) -> tuple[Loop, int]:
    """A loop whose weights can be streamed, on a GPU with ``free`` bytes, and the budget of its engine."""
    change_file(folder, "transformer", streamable=STREAMABLE, weights=STREAMABLE + 1000)
    gpu.memory_bytes = gpu.in_use + free
    loop = Loop(folder, device)
    engine = gpu.engines[-1]()
    assert engine is not None
    return loop, engine.weight_streaming_budget_v2


def test_streamed_weights_leave_room_for_everything_else(folder: Path, gpu: Gpu, bundle: Path) -> None:
    """The automatic budget would be an int32, and know nothing of arena and engines to come."""
    device = Device(gpu.capability)
    device.weights_to_come = 3_000_000_000
    loop, budget = streamed(folder, gpu, device, free=16_000_000_000)
    taken = 16_000_000_000 - 1000 - 3_000_000_000 - largest(loop) - GIB
    assert taken - 100_000_000 < budget < taken
    for _ in range(4):
        loop.run()
    assert gpu.captures == [], "an engine that streams is synchronous and cannot be captured"
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    loop.close()
    device.close()


def test_weights_that_fit_are_not_streamed(folder: Path, gpu: Gpu, device: Device, backend: str) -> None:
    loop, budget = streamed(folder, gpu, device, free=40_000_000_000)
    assert budget == STREAMABLE
    for _ in range(3):
        loop.run()
    assert gpu.captures
    loop.close()


def test_a_budget_that_tensorrt_does_not_take_is_an_error(
    folder: Path, gpu: Gpu, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored = property(lambda self: STREAMABLE, lambda self, budget: None)
    for kind in (Engine, RtxEngine):
        monkeypatch.setattr(kind, "weight_streaming_budget_v2", ignored)
    with pytest.raises(EngineError, match=r"keeps 20,000,000,000 bytes of transformer on the GPU, which has room for"):
        streamed(folder, gpu, device, free=16_000_000_000)


# Weights that come and go


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_weights_leave_and_come_back_while_contexts_stay(folder: Path, gpu: Gpu, bundle: Path) -> None:
    device = Device(gpu.capability, DeviceOptions(unloads=True, cuda_graphs=True))
    loop = Loop(folder, device)
    weights = json.loads((folder / "transformer.engine").read_text())["weights"]
    for _ in range(2):
        loop.run()
    held = gpu.in_use
    assert loop.session.unload()
    assert gpu.in_use == held - weights
    loop.run()
    assert gpu.in_use == held
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    assert gpu.log.count(("load", "transformer")) == gpu.log.count(("context", "transformer")) == 1
    gpu.memory_bytes = gpu.in_use
    assert loop.session.unload()
    gpu.memory_bytes -= 1
    with pytest.raises(EngineError, match=r"transformer has .* bytes, the GPU .* free"):
        loop.run()
    gpu.memory_bytes += 1
    loop.run()
    loop.close()
    device.close()
    assert gpu.crashes == []


def test_weights_that_tensorrt_cannot_load_alone_are_loaded_with_the_engine(
    folder: Path, gpu: Gpu, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RtxEngine, "load_weights", lambda self, blob: False)
    device = Device(gpu.capability, DeviceOptions(unloads=True))
    loop = Loop(folder, device)
    loop.run()
    assert loop.results()
    assert not loop.session.unload()
    loop.close()
    device.close()
