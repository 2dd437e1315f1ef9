"""The fake is as strict as it says."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from qie.engines.sessions.device import Device
from tests.support.fake_gpu import Gpu, Misuse, RuntimeCache
from tests.support.fake_gpu.types import ILogger, Strategy
from tests.support.tensorrt_sessions import Loop, record_of


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
    assert context.update_device_memory_size_for_shapes() == 0


def test_the_fake_raises_what_the_bindings_raise(loop: Loop, device: Device, gpu: Gpu) -> None:
    loop.run()
    context, stream = gpu.contexts[-1](), int(device.stream)
    assert context is not None
    with pytest.raises(RuntimeError, match="set optimization profile"):
        context.set_optimization_profile_async(7, stream)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        context.set_input_shape("latents", np.array([1, 16, 64]))
    with pytest.raises(RuntimeError, match="cast"):
        context.set_input_shape("latents", (1, 1 << 40, 64))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        context.set_tensor_address("latents", None)
    with pytest.raises(ValueError, match="should return >= 0"):
        tuple(context.get_tensor_shape("other"))
    assert context.set_input_shape("rotary_cos", (44, context.shapes["rotary_cos"][1]))
    with pytest.raises(RuntimeError, match="infer_shapes error code: -1"):
        context.infer_shapes()


def test_the_fakes_cache_is_bound_to_its_gpu() -> None:
    kept = RuntimeCache(Gpu(device=0)).serialize()
    assert RuntimeCache(Gpu()).deserialize(kept)
    assert not RuntimeCache(Gpu(driver="1")).deserialize(kept)
    assert not RuntimeCache(Gpu()).deserialize(b"")
    assert RuntimeCache(Gpu()).serialize() is None, "without a CUDA context there is nothing to write"


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_the_fake_crashes_in_the_wrong_order_of_destruction(folder: Path, gpu: Gpu) -> None:
    device = Device(gpu.capability)
    record = record_of(folder, "transformer")
    runtime = import_module("tensorrt_rtx").Runtime(ILogger())
    engine = runtime.deserialize_cuda_engine((folder / record.path).read_bytes())
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(Strategy.USER_MANAGED)
    cache = config.create_runtime_cache()
    config.set_runtime_cache(cache)
    context = engine.create_execution_context(config)
    del cache
    assert gpu.crashes == ["a runtime cache is destroyed before the contexts that were made with it"]
    del context
    assert len(gpu.crashes) == 2
    del engine
    assert gpu.crashes[2:] == ["an engine is destroyed before its runtime config"]
    device.close()
