"""The fake is as strict as it says."""

import numpy as np
import pytest

from qie.engines.sessions.device import Device
from tests.support.fake_gpu import Gpu, Misuse, RuntimeCache
from tests.support.tensorrt_sessions import (
    Loop,
)


def test_the_fake_finds_what_tensorrt_would_not_survive(loop: Loop, device: Device, gpu: Gpu) -> None:
    loop.run()
    context, stream = gpu.contexts[-1](), int(device.stream)
    assert context is not None
    good = dict(context.addresses)

    context.addresses = {name: address for name, address in good.items() if name != "guidance"}
    assert not context.execute_async_v3(stream)
    assert "addresses of ['guidance'] are not set" in gpu.refused[-1]

    context.addresses = good | {"latents": 0x1234}
    with pytest.raises(Misuse, match="latents: 0x1234 is not allocated"):
        context.execute_async_v3(stream)

    context.addresses = good | {"latents": good["guidance"]}
    with pytest.raises(Misuse, match="4096 bytes at .*, which has 4"):
        context.execute_async_v3(stream)

    unwritten = device.empty((1, 16, 64), np.float32)
    context.addresses = good | {"latents": unwritten.address}
    assert context.execute_async_v3(stream)
    with pytest.raises(Misuse, match="reads latents of 4096 bytes, None were written"):
        device.synchronize()

    context.addresses, context.arena = good, (device.arena.address, 10)
    with pytest.raises(Misuse, match="without enough memory for activations"):
        context.execute_async_v3(stream)
    with pytest.raises(Misuse, match="not aligned"):
        context.set_device_memory(device.arena.address + 8, device.arena.size)
    with pytest.raises(Misuse, match="is no stream"):
        context.execute_async_v3(7)

    context.shapes.pop("latents")
    assert not context.execute_async_v3(stream)
    assert not context.set_input_shape("latents", (5, 16, 64))
    assert not context.set_input_shape("velocity", (1, 16, 64))
    assert not context.set_tensor_address("other", good["latents"])


def test_the_fakes_cache_is_bound_to_its_gpu() -> None:
    kept = RuntimeCache(Gpu()).serialize()
    assert RuntimeCache(Gpu()).deserialize(kept)
    assert not RuntimeCache(Gpu(driver="1")).deserialize(kept)
    assert not RuntimeCache(Gpu()).deserialize(b"")
