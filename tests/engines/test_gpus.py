"""The GPUs that the driver offers, against stand-ins of its library: one in C that ctypes loads, and one in Python."""

import ctypes
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qie.engines import gpus as module
from qie.engines.gpus import Driver, find_driver
from tests.support.libcuda import NAMES, Libcuda, StandIn, compile_library, made_up_uuid

L40S = StandIn(name="NVIDIA L40S", capability="8.9", bytes=47_576_711_168, pci="0000:65:00.0", uuid=made_up_uuid(1))
A100 = StandIn(
    name="NVIDIA A100-SXM4-80GB", capability="8.0", bytes=85_094_105_088, pci="0000:01:00.0", uuid=made_up_uuid(2)
)
SLICE = StandIn(
    name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", capability="8.0", bytes=5_100_273_664, uuid=made_up_uuid(3, "MIG")
)
GB10 = StandIn(name="NVIDIA GB10", capability="12.1", bytes=128 << 30, integrated=1, pci="000F:01:00.0")

Install = Callable[..., None]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return compile_library(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture(params=["C", "Python"])
def install(
    request: pytest.FixtureRequest, library: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Install:
    """Gives the machine a driver with these GPUs; ``visible`` and ``order`` are the environment variables of CUDA."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def put(
        *gpus: StandIn, visible: str | None = None, order: str | None = None, cuda: int = 12080, init: int = 0
    ) -> None:
        for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        if request.param == "Python" or library is None:
            driver = Libcuda(gpus, cuda=cuda, init=init)
            monkeypatch.setattr(module, "libcuda", lambda: driver)
            return
        monkeypatch.setenv("STANDIN_GPUS", ";".join(gpu.row for gpu in gpus))
        monkeypatch.setenv("STANDIN_CUDA", str(cuda))
        monkeypatch.setenv("STANDIN_INIT", str(init))
        copies = len(list(tmp_path.iterdir()))  # a copy is another library, with a state of its own
        monkeypatch.setattr(module, "LIBRARY", str(shutil.copy(library, tmp_path / f"libcuda-{copies}.so")))

    return put


def names(driver: Driver) -> list[tuple[int, str]]:
    return [(gpu.index, gpu.name) for gpu in driver.gpus]


def test_gpus(install: Install) -> None:
    install(L40S, GB10, SLICE)
    driver = find_driver()
    assert [(gpu.index, gpu.name, gpu.compute_capability, gpu.memory_gib, gpu.pci) for gpu in driver.gpus] == [
        (0, "NVIDIA L40S", "8.9", 44.3, "0000:65:00.0"),
        (1, "NVIDIA GB10", "12.1", None, "000F:01:00.0"),
        (2, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "8.0", 4.8, "0000:01:00.0"),
    ]
    assert (driver.cuda, driver.no_gpu) == ("12.8", None)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", [A100]),
        ("2,0", [SLICE, L40S]),
        (SLICE.uuid, [SLICE]),
        (f"{A100.uuid},{L40S.uuid}", [A100, L40S]),
        ("0,9,1", [L40S]),
        (None, [L40S, A100, SLICE]),
    ],
)
def test_the_environment_hides_and_orders_them(install: Install, visible: str | None, expected: list[StandIn]) -> None:
    install(L40S, A100, SLICE, visible=visible)
    found = [(gpu.index, gpu.name, gpu.uuid) for gpu in find_driver().gpus]
    assert found == [(index, gpu.name, gpu.uuid) for index, gpu in enumerate(expected)]


def test_the_order_may_be_that_of_the_bus(install: Install) -> None:
    install(L40S, A100, order="PCI_BUS_ID")
    assert names(find_driver()) == [(0, A100.name), (1, L40S.name)]


@pytest.mark.parametrize("visible", ["", "-1", "7", "GPU-x"])
def test_a_variable_that_hides_all_is_named(install: Install, visible: str) -> None:
    install(L40S, visible=visible)
    driver = find_driver()
    assert (driver.gpus, driver.cuda) == ((), "12.8")
    assert driver.no_gpu == (
        f"CUDA finds no GPU here (CUDA_ERROR_NO_DEVICE from cuInit), and CUDA_VISIBLE_DEVICES is {visible!r}; unset "
        "CUDA_VISIBLE_DEVICES, or set it to GPUs of this machine"
    )


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (100, r"\(CUDA_ERROR_NO_DEVICE from cuInit\); use a machine with an NVIDIA GPU"),
        (803, r"\(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH from cuInit\), since .* another version than the driver; restart"),
        (4242, r"\(error 4242 from cuInit\); use a machine with an NVIDIA GPU, or check its driver"),
    ],
)
def test_a_driver_that_does_not_work(install: Install, init: int, reason: str) -> None:
    install(L40S, init=init)
    driver = find_driver()
    assert driver.gpus == ()
    assert re.search(reason, str(driver.no_gpu))


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    assert find_driver() == Driver(
        no_gpu=f"{tmp_path}/libcuda.so.1 of NVIDIA's driver does not load here; install the driver, or start the "
        "container with GPUs"
    )


def test_threads_see_the_same(install: Install) -> None:
    install(L40S, A100)
    found: list[Driver] = []
    threads = [threading.Thread(target=lambda: found.append(find_driver())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [find_driver()] * 8


def test_a_forked_process_is_told_why_it_has_none(install: Install) -> None:
    install(L40S)
    assert find_driver().gpus
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, str(find_driver().no_gpu).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        assert pipe.read().startswith(
            "CUDA finds no GPU here (CUDA_ERROR_NOT_INITIALIZED from cuInit), as after a fork"
        )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: 12.3.0\n",
            "570.86.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\n", "580.95.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build\n", "580.95.05"),
        ("something else", None),
        (None, None),
    ],
)
def test_the_version_of_the_driver(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, version: str | None
) -> None:
    install(L40S)
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(module, "DRIVER_VERSION", path)
    assert find_driver().version == version


def test_the_stand_ins_refuse_what_a_driver_refuses(library: Path | None) -> None:
    """Nothing works before ``cuInit`` but the version."""
    libraries = [Libcuda([L40S]), *([ctypes.CDLL(str(library))] if library else [])]
    for driver in libraries:
        value, size = ctypes.c_int(), ctypes.c_size_t()
        zero = ctypes.c_int(0)
        assert driver.cuDriverGetVersion(ctypes.byref(value)) == 0
        assert driver.cuDeviceGetCount(ctypes.byref(value)) == 3
        assert driver.cuDeviceGet(ctypes.byref(value), zero) == 3
        assert driver.cuDeviceTotalMem_v2(ctypes.byref(size), zero) == 3
        assert driver.cuInit(ctypes.c_uint(1)) == 1
    python = libraries[0]
    assert python.cuInit(ctypes.c_uint(0)) == 0
    assert python.cuDeviceGet(ctypes.byref(value), ctypes.c_int(1)) == 101
    assert python.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(10**6), zero) == 1


def test_codes_and_attributes_are_those_of_cuda_h() -> None:
    cuda = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    code, attribute = cuda.CUresult, cuda.CUdevice_attribute
    assert code.CUDA_ERROR_NOT_INITIALIZED == module.NOT_INITIALIZED
    assert code.CUDA_ERROR_NO_DEVICE == module.NO_DEVICE
    assert code.CUDA_ERROR_INVALID_DEVICE == module.INVALID_DEVICE
    assert code.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH == module.DRIVER_MISMATCH
    assert attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == module.COMPUTE_CAPABILITY_MAJOR
    assert attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == module.COMPUTE_CAPABILITY_MINOR
    assert attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED == module.INTEGRATED
    for number, name in NAMES.items():
        assert code(number).name == name.decode()
