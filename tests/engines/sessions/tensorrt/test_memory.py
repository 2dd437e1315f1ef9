"""Memory: the arena, weights, profiles and weight streaming."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from qie.engines.errors import RequestError
from qie.engines.sessions.device import Device
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.fake_gpu import Context, Gpu, need
from tests.support.tensorrt_sessions import (
    Loop,
    change_file,
    on_cpu,
    run,
    same,
    values,
)


def test_the_arena_is_what_the_shapes_need(loop: Loop, device: Device) -> None:
    loop.run()
    assert device.arena.size == need({name: array.shape for name, array in loop.arrays.items()})


def test_the_largest_need_is_the_rule_where_tensorrt_says_none(
    loop: Loop, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "update_device_memory_size_for_shapes", lambda self: 0)
    loop.run()
    limits = {p.input: p.max for p in loop.record.profiles}
    assert device.arena.size == need({name: limits.get(name, a.shape) for name, a in loop.arrays.items()})


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


def test_weights_that_can_be_streamed_get_tensorrts_budget(folder: Path, device: Device, gpu: Gpu) -> None:
    record = change_file(folder, "transformer", streamable=1000)
    session = TensorRtSession(folder, record, device)
    engine = gpu.engines[-1]()
    assert engine is not None
    assert engine.weight_streaming_budget_v2 == 500
    del engine
    session.close()
