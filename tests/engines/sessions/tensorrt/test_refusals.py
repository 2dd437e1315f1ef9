"""Engines and runs that TensorRT, the GPU or the manifest do not allow."""

import gc
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.errors import BundleError, EngineError, EngineMismatchError, QieError, RequestError
from qie.engines.sessions.device import Device, DeviceOptions
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.fake_gpu import Code, Context, Engine, Gpu, RtxEngine, RtxRuntime
from tests.support.tensorrt_sessions import (
    Loop,
    change_file,
    record_of,
    record_of_any_size,
    session_of,
)


def test_a_file_that_is_no_engine(folder: Path, device: Device, backend: str) -> None:
    (folder / "vision.engine").write_bytes(b"\x00" * 100)
    with pytest.raises(BundleError) as problem:
        TensorRtSession(folder, record_of_any_size(folder, "vision"), device)
    module = backend.replace("-", "_")
    reason = "MALFORMED_ENGINE): the file is damaged; " if backend == "tensorrt-rtx" else "header.magicTag"
    assert f"{module} 1.7.1 cannot load {folder}/vision.engine ({reason}" in str(problem.value)
    assert "build the bundle again with `qie build`" in str(problem.value)


@pytest.mark.parametrize("key", ["version", "capability"])
def test_an_engine_of_another_version_or_gpu(folder: Path, device: Device, key: str, backend: str) -> None:
    record = change_file(folder, "vision", **{key: "9.9"})
    if backend == "tensorrt":
        expected: tuple[type[QieError], str] = BundleError, rf"{key} is 9\.9, expected"
    elif key == "version":
        expected = BundleError, r"VERSION_MISMATCH\): it was built by another version; build the bundle again"
    else:
        expected = EngineMismatchError, r"UNSUPPORTED_CC\): it is for another GPU; build for this one"
    with pytest.raises(expected[0], match=rf"cannot load .*vision.engine \({expected[1]}"):
        TensorRtSession(folder, record, device)


def test_a_file_that_was_emptied_or_deleted(folder: Path, device: Device) -> None:
    record = record_of(folder, "vision")
    (folder / "vision.engine").write_bytes(b"")
    with pytest.raises(BundleError, match=r"vision.engine cannot be read \(cannot mmap an empty file\); build"):
        TensorRtSession(folder, record, device)
    (folder / "vision.engine").unlink()
    with pytest.raises(BundleError, match=r"vision.engine cannot be read \(.*No such file.*\); build the bundle again"):
        TensorRtSession(folder, record, device)


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_driver_that_is_too_old_for_the_engine(folder: Path, device: Device, gpu: Gpu) -> None:
    gpu.old_driver = True
    with pytest.raises(
        EngineMismatchError, match=r"\(OLD_CUDA_DRIVER\): the driver is too old for it; update the driver"
    ):
        session_of(folder, "vision", device)


def test_an_engine_for_which_there_is_no_room(folder: Path, device: Device, gpu: Gpu) -> None:
    gpu.memory_bytes = 10_000
    with pytest.raises(EngineError) as problem:
        session_of(folder, "transformer", device)
    assert re.match(r"transformer has [\d,]+ bytes, the GPU 10,000 of 10,000 bytes free \(", str(problem.value))
    assert 'build with residency = "sequential"' in str(problem.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"inputs": [["latents", "float32", [-1, -1, -1, 32]]]},
         "latents as input float32 1x-1x-1x32, expected input float32 1x-1x-1x64"),
        ({"inputs": [["latents", "float32", [2, -1, -1, 64]]]},
         "latents as input float32 2x-1x-1x64, expected input float32 -1x-1x-1x64"),
        ({"inputs": [["latents", "float32", [-1, 8, -1, 64]]]},
         "latents as input float32 1x8x-1x64, expected input float32 1x-1x-1x64"),
        ({"inputs": [["latents", "int64", [-1, -1, -1, 64]]]}, "latents as input int64 1x-1x-1x64"),
        ({"inputs": [["noise", "float32", [-1, -1, -1, 64]]]}, "latents as nothing, expected input float32"),
        ({"outputs": [["image", "uint8", [-1, -1, 3]]]}, "image as output uint8 of 3 dims, expected .* 4 dims"),
        ({"outputs": [["image", "uint8", [-1] * 4], ["more", "uint8", [1]]]}, "more as .*, expected nothing"),
        ({"host": ["latents"]}, "latents as input float32 1x-1x-1x64 on the host"),
    ],
)  # fmt: skip
def test_an_engine_that_is_not_the_manifests(
    folder: Path, device: Device, changes: dict[str, Any], expected: str
) -> None:
    record = change_file(folder, "vae_decoder", **changes)
    with pytest.raises(BundleError, match=f"vae_decoder.engine has {expected}.*; build the bundle again"):
        TensorRtSession(folder, record, device)


def test_an_engine_that_knows_less_of_an_outputs_dims(folder: Path, device: Device) -> None:
    record = change_file(folder, "vae_decoder", outputs=[["image", "uint8", [-1, -1, -1, -1]]])
    TensorRtSession(folder, record, device).close()


def test_wrong_tensors(loop: Loop, device: Device) -> None:
    session, inputs, outputs = loop.session, loop.inputs, loop.outputs

    def refused(expected: str, inputs: dict[str, Any] = inputs, outputs: dict[str, Any] = outputs) -> None:
        with pytest.raises(AssertionError, match=f"transformer: {expected}"):
            session.run(inputs, outputs)

    refused("guidance missing or unknown", {name: t for name, t in inputs.items() if name != "guidance"})
    refused("velocity missing or unknown", outputs={"latents_next": outputs["latents_next"]})
    refused("other missing or unknown", inputs | {"other": inputs["latents"]})
    double = device.upload(loop.arrays["latents"].astype(np.float64))
    refused("latents is float64 1x16x64, expected float32 batchxnoise_tokensx64", inputs | {"latents": double})
    refused("latents is float32 1, expected float32", inputs | {"latents": inputs["guidance"]})
    narrow = device.upload(np.zeros((1, 16, 32), np.float32))
    refused("latents is float32 1x16x32", inputs | {"latents": narrow})
    shorter = session.empty("velocity", loop.sizes | {"noise_tokens": 15})
    refused("velocity is 1x15x64, expected 1x16x64", outputs=outputs | {"velocity": shorter})
    long = device.upload(np.zeros((1, 4097, 64), np.float32))
    with pytest.raises(
        RequestError, match="latents of transformer is 1x4097x64, expected 1x1x64 to 4x4096x64; use ano"
    ):
        session.run(inputs | {"latents": long}, outputs)
    loop.run()  # and a good run afterwards
    assert loop.results()


def test_a_run_that_tensorrt_refuses(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream_handle: self.refuse("for a reason"))
    with pytest.raises(
        EngineError, match=r"cannot run transformer, a run cannot be enqueued \(transformer: for a reason\); use"
    ):
        loop.run()


def test_shapes_that_tensorrt_cannot_infer(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "infer_shapes", lambda self: ["latents", "reference"])
    with pytest.raises(EngineError, match="the shapes of latents, reference are unknown; use a smaller size"):
        loop.run()


def test_what_the_bindings_raise_is_an_error_of_the_engine(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyCore.cpp: RuntimeError where a call fails, TypeError where it is given None, ValueError for dims of no rank."""
    for name, problem, expected in (
        ("set_optimization_profile_async", RuntimeError("Error in set"), "profile cannot be set to 0: Error in set"),
        ("set_input_shape", RuntimeError("Unable to cast"), "latents cannot be set to 1x16x64: Unable to cast"),
        ("infer_shapes", RuntimeError("error code: -1"), "shapes that do not belong together: error code: -1"),
        ("get_tensor_shape", ValueError("__len__"), "the shape of velocity is unknown: __len__"),
        ("execute_async_v3", TypeError("incompatible"), "a run cannot be enqueued: incompatible"),
    ):

        def fail(*_: Any, problem: Exception = problem) -> None:
            raise problem

        with monkeypatch.context() as patch, pytest.raises(EngineError, match=f"cannot run transformer, .*{expected}"):
            patch.setattr(Context, name, fail)
            loop.run()
    loop.run()
    assert loop.results()


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("of the library")


@pytest.mark.parametrize(
    "name",
    ["deserialize_cuda_engine", "get_engine_validity", "get_tensor_dtype", "create_runtime_config", "load_weights"],
)
@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_what_the_bindings_raise_while_loading_is_an_error_too(
    folder: Path, gpu: Gpu, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(gpu.capability, DeviceOptions(unloads=True))
    for kind in (RtxRuntime, RtxEngine, Engine):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, fail)
    with pytest.raises((BundleError, EngineError), match="of the library"):
        session_of(folder, "vision", device)
    device.close()
    gc.collect()
    assert (gpu.blocks, gpu.in_use, gpu.crashes) == ({}, 0, [])


def test_a_runtime_that_cannot_be_made(
    folder: Path, device: Device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(import_module(backend.replace("-", "_")), "Runtime", none)
    with pytest.raises(BundleError, match="factory function returned nullptr"):
        session_of(folder, "vision", device)


def test_inputs_that_contradict_each_other(loop: Loop, device: Device) -> None:
    shape = loop.arrays["rotary_cos"].shape
    tables = {
        name: device.upload(np.zeros((shape[0] - 1, shape[1]), np.float32)) for name in ("rotary_cos", "rotary_sin")
    }
    with pytest.raises(EngineError, match="shapes that do not belong together: infer_shapes error code: -1"):
        loop.session.run(loop.inputs | tables, loop.outputs)
    tables.clear()


def test_a_context_that_cannot_be_made(folder: Path, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(folder, device)
    for kind in (Engine, RtxEngine):
        monkeypatch.setattr(kind, "create_execution_context", lambda *_: None)
    with pytest.raises(EngineError, match="no execution context can be created"):
        loop.run()
    loop.close()


def test_no_memory_for_activations(loop: Loop, gpu: Gpu) -> None:
    gpu.memory_bytes = gpu.in_use + 100
    with pytest.raises(EngineError, match="the GPU is out of memory"):
        loop.run()
    gpu.memory_bytes = 1 << 34
    loop.run()
    assert loop.results()


def test_a_run_that_fails_on_the_gpu(folder: Path, device: Device, gpu: Gpu) -> None:
    loop = Loop(folder, device)
    loop.run()
    gpu.broken = Code.cudaErrorIllegalAddress
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        loop.results()


def test_the_real_runtime_refuses_a_file_that_is_no_engine(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    """What of loading needs no driver: the logger, the mapped file, the words of a refusal."""
    pytest.importorskip("tensorrt_rtx")
    gpu = Gpu()
    gpu.install(monkeypatch)
    record = replace(
        record_of(bundle, "vision"), backend="tensorrt-rtx", compute_capability="8.9", path="vision.engine"
    )
    (tmp_path / "vision.engine").write_bytes(b"no engine" * 100)
    with pytest.raises(BundleError, match=r"tensorrt_rtx .* cannot load .* \(MALFORMED_ENGINE\): the file is damaged"):
        TensorRtSession(tmp_path, record, Device("8.9"))
