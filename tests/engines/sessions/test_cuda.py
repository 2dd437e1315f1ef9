"""The calls of CUDA and what the sessions share on a GPU, against a fake that refuses what a driver refuses."""

import gc
import weakref

import numpy as np
import pytest

from qie.engines.errors import EngineError, EngineMismatchError
from qie.engines.sessions import cuda
from qie.engines.sessions.device import RUNS_AHEAD, Block, Device
from tests.support.fake_gpu import Code, Gpu, Misuse

ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.arange(7, dtype=np.int64),
    np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
    np.arange(24, dtype=np.float32).reshape(4, 6).T,
    np.arange(24, dtype=np.float32)[::3],
    np.ones(1, np.float32),
]


@pytest.fixture
def device(plain_gpu: Gpu) -> Device:
    return Device("8.9")


def calls(gpu: Gpu, *names: str) -> list[str]:
    return [name for name, _ in gpu.log if name in names]


# Calls


def test_no_gpu(plain_gpu: Gpu) -> None:
    plain_gpu.count = 0
    with pytest.raises(
        EngineMismatchError, match=r"capability 8\.9, and CUDA finds no GPU here .CUDA_ERROR_NO_DEVICE from cuInit"
    ):
        Device("8.9")


def test_another_gpu(plain_gpu: Gpu) -> None:
    with pytest.raises(EngineMismatchError, match=r"capability 8\.0, and this machine has Fake L40S \(8\.9\)"):
        Device("8.0")


def test_a_chosen_gpu(plain_gpu: Gpu) -> None:
    plain_gpu.count = 2
    for chosen, expected in ((None, 0), (0, 0), (1, 1)):
        device = Device("8.9", device=chosen)
        assert device.gpu.index == plain_gpu.device == expected
        device.close()
    with pytest.raises(EngineMismatchError, match="there is no GPU 2, where GPU 0 is Fake L40S, GPU 1 is Fake L40S"):
        Device("8.9", device=2)


def test_a_gpu_that_cannot_be_used(plain_gpu: Gpu) -> None:
    with pytest.raises(EngineMismatchError, match="cudaErrorInvalidDevice from cudaSetDevice"):
        cuda.use(3)


def test_out_of_memory(plain_gpu: Gpu) -> None:
    with pytest.raises(EngineError) as problem:
        cuda.allocate(plain_gpu.memory_bytes + 1)
    assert "out of memory (cudaErrorMemoryAllocation), 17,179,869,185 bytes were requested" in str(problem.value)
    assert "17,179,869,184 of 17,179,869,184 are free; use a smaller size" in str(problem.value)


def test_a_failure_of_earlier_work_is_met_at_the_wait(device: Device, plain_gpu: Gpu) -> None:
    tensor = device.upload(ARRAYS[0])
    plain_gpu.broken = Code.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match=r"the GPU failed \(cudaErrorIllegalAddress from cudaStreamSynchronize\)"):
        device.download(tensor)
    plain_gpu.broken = None
    del tensor
    device.close()


def test_capture(device: Device, plain_gpu: Gpu) -> None:
    source, target = device.upload(ARRAYS[0]), device.empty(ARRAYS[0].shape, np.float32)

    def copy(target: int = target.address, source: int = source.address, size: int = source.nbytes) -> bool:
        cuda.copy_on_device(target, source, size, device.stream)
        return True

    device.synchronize()
    graph = cuda.capture(device.stream, copy)
    assert graph is not None
    assert not np.array_equal(device.download(target), ARRAYS[0])  # captured, not done
    graph.launch(device.stream)
    assert np.array_equal(device.download(target), ARRAYS[0])
    graph.close()
    with pytest.raises(Misuse, match="destroyed"):
        graph.launch(device.stream)
    del source, target
    device.close()


@pytest.mark.parametrize("way", ["refused", "allocates", "waits"])
def test_what_cannot_be_captured(device: Device, plain_gpu: Gpu, way: str) -> None:
    def enqueue() -> bool:
        if way == "allocates":
            cuda.allocate(16)
        if way == "waits":
            device.stream.synchronize()
        return False

    if way == "refused":
        assert cuda.capture(device.stream, enqueue) is None
    else:
        with pytest.raises(EngineError, match="cudaErrorStreamCaptureUnsupported"):
            cuda.capture(device.stream, enqueue)
    assert np.array_equal(device.download(device.upload(ARRAYS[1])), ARRAYS[1])  # the stream works as before
    device.close()


# The device


@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_what_is_uploaded_comes_back(device: Device, array: np.ndarray) -> None:
    tensor = device.upload(array)
    back = device.download(tensor)
    assert (back.dtype, back.shape) == (array.dtype, array.shape) == (tensor.dtype, tensor.shape)
    assert np.array_equal(back, array)
    del tensor
    device.close()


def test_copy(device: Device) -> None:
    source, target = device.upload(ARRAYS[0]), device.empty(ARRAYS[0].shape, np.float32)
    device.copy(source, target)
    assert np.array_equal(device.download(target), ARRAYS[0])
    with pytest.raises(AssertionError):
        device.copy(source, device.empty((2, 3, 5), np.float32))
    del source, target
    device.close()


def test_an_array_is_kept_until_its_copy_is_done(device: Device) -> None:
    array = np.arange(1000, dtype=np.float32)
    tensor, reference = device.upload(array), weakref.ref(array)
    del array
    gc.collect()
    assert reference() is not None
    device.synchronize()
    assert reference() is None
    del tensor
    device.close()


def test_memory_comes_back_when_memory_is_next_asked_for(device: Device, plain_gpu: Gpu) -> None:
    tensor = device.upload(ARRAYS[0])
    held = plain_gpu.in_use
    del tensor
    assert plain_gpu.in_use == held  # giving back waits for the GPU, so it is put off
    other = device.empty((1,), np.float32)
    assert plain_gpu.in_use == 4
    assert calls(plain_gpu, "synchronize", "free") == ["synchronize", "free"]
    del other
    device.close()


def test_the_arena_is_as_large_as_the_largest_need(device: Device, plain_gpu: Gpu) -> None:
    assert device.arena == Block(0, 0)
    small = device.reserve(1000)
    assert small.size == plain_gpu.in_use == 1000
    assert device.reserve(400) == small
    large = device.reserve(3000)
    assert large.size == plain_gpu.in_use == plain_gpu.peak == 3000  # the old one went first
    assert large.address != small.address
    assert device.reserve(3000) == device.arena == large
    with pytest.raises(EngineError, match="out of memory"):
        device.reserve(plain_gpu.memory_bytes * 2)
    assert device.reserve(500).size == 500  # the failure left nothing that looks like an arena
    device.close()


def test_the_host_is_never_far_ahead_and_never_behind(device: Device, plain_gpu: Gpu) -> None:
    for _ in range(10):
        device.queue(lambda: plain_gpu.enqueue(plain_gpu.stream(device.stream), "run", lambda: None))
    assert plain_gpu.deepest == RUNS_AHEAD
    assert plain_gpu.starved == 0
    device.close()


def test_nothing_is_left(device: Device, plain_gpu: Gpu) -> None:
    tensors = [device.upload(array) for array in ARRAYS]
    device.reserve(5000)
    del tensors
    device.close()
    assert plain_gpu.in_use == 0
    assert plain_gpu.blocks == {}


# The fake is as strict as it says


def test_the_fake_finds_misuse(plain_gpu: Gpu) -> None:
    stream = cuda.Stream()
    address = cuda.allocate(64)
    array = np.zeros(64, np.uint8)
    with pytest.raises(Misuse, match="64 bytes at .*, which has 64|80 bytes"):
        cuda.copy_to_device(address, np.zeros(80, np.uint8), stream)
        stream.synchronize()
    cuda.copy_to_device(address, array, stream)
    array[0] = 1
    with pytest.raises(Misuse, match="changed before its copy was done"):
        stream.synchronize()
    cuda.copy_to_host(array, address, stream)
    assert (array == 0xCD).all()  # garbage until it is waited for
    stream.synchronize()
    cuda.copy_on_device(address, address + 8, 8, stream)
    with pytest.raises(Misuse, match="not allocated"):
        stream.synchronize()
    cuda.copy_to_host(array, address, stream)
    cuda.free(address)
    with pytest.raises(Misuse, match="was freed"):
        stream.synchronize()
    with pytest.raises(Misuse, match="not allocated"):
        cuda.free(address)
    with pytest.raises(Misuse, match="of nothing"):
        cuda.allocate(0)
    stream.close()
    with pytest.raises(Misuse, match="is no stream"):
        stream.synchronize()
