"""The sessions of TensorRT on a fake GPU: shapes, places, contexts, graphs, the arena, and what is refused."""

import gc
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import Component, EngineRecord, TensorSpec
from qie.engines.errors import BundleError, EngineError, RequestError
from qie.engines.sessions.device import Device
from qie.engines.sessions.load import load
from qie.engines.sessions.tensorrt import TensorRtSession
from tests.support.fake_gpu import Code, Context, Engine, Gpu, Misuse, RtxEngine, RuntimeCache, need

Arrays = dict[str, NDArray[Any]]
DECODER = {"batch": 2, "rows": 4, "columns": 6}
TRANSFORMER = {"batch": 1, "noise_tokens": 16, "reference_tokens": 20, "text_tokens": 9, "tokens": 45}


@pytest.fixture
def folder(gpu: Gpu, bundle: Path, tmp_path: Path, backend: str) -> Path:
    return gpu.retarget(bundle, tmp_path / "gpu", backend)


@pytest.fixture
def device(gpu: Gpu) -> Iterator[Device]:
    """A device; whatever a test did on it, nothing is left when it is closed."""
    device = Device(gpu.capability)
    yield device
    if gpu.broken is None:
        gc.collect()
        device.close()
        assert gpu.blocks == {}


def record_of(folder: Path, component: Component) -> EngineRecord:
    (record,) = [e for e in open_bundle(str(folder)).manifest.engines if e.component == component]
    return record


def session_of(folder: Path, component: Component, device: Device) -> TensorRtSession:
    session = load(folder, record_of(folder, component), device)
    assert isinstance(session, TensorRtSession)
    return session


def change_file(folder: Path, component: Component, **values: Any) -> EngineRecord:
    """Change what the fake engine is; its record stays."""
    path = folder / f"{component}.engine"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return record_of_any_size(folder, component)


def record_of_any_size(folder: Path, component: Component) -> EngineRecord:
    manifest = json.loads((folder / "manifest.json").read_text())
    for engine in manifest["engines"]:
        for file in engine["files"]:
            file["bytes"] = (folder / file["path"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return record_of(folder, component)


def values(specs: tuple[TensorSpec, ...], sizes: dict[str, int], seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        s.name: generator.random(s.shape(sizes)).astype(np.float32)
        if s.dtype == "float32"
        else generator.integers(0, 4, s.shape(sizes)).astype(s.dtype)
        for s in specs
    }


def run(session: Any, arrays: Arrays, sizes: dict[str, int], outputs: tuple[TensorSpec, ...]) -> Arrays:
    results = {spec.name: session.empty(spec.name, sizes) for spec in outputs}
    session.run({name: session.upload(array) for name, array in arrays.items()}, results)
    return {name: session.download(tensor) for name, tensor in results.items()}


def on_cpu(bundle: Path, component: Component, arrays: Arrays, sizes: dict[str, int]) -> Arrays:
    record = record_of(bundle, component)
    return run(load(bundle, record), arrays, sizes, record.outputs)


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# Runs


def test_a_run(folder: Path, bundle: Path, device: Device) -> None:
    session = session_of(folder, "vae_decoder", device)
    record = record_of(folder, "vae_decoder")
    for seed, sizes in enumerate((DECODER, DECODER | {"rows": 2}, {"batch": 1, "rows": 5, "columns": 3}, DECODER)):
        sizes = sizes | {"height": sizes["rows"] * 16, "width": sizes["columns"] * 16}
        arrays = values(record.inputs, sizes, seed)
        assert same(run(session, arrays, sizes, record.outputs), on_cpu(bundle, "vae_decoder", arrays, sizes))
    session.close()


class Loop:
    """A transformer that is run with the same tensors again and again, as the denoising loop does."""

    def __init__(self, folder: Path, device: Device, sizes: dict[str, int] = TRANSFORMER) -> None:
        self.record = record_of(folder, "transformer")
        self.session = session_of(folder, "transformer", device)
        self.sizes = sizes
        self.arrays = values(self.record.inputs, sizes)
        self.inputs = {name: self.session.upload(array) for name, array in self.arrays.items()}
        self.outputs = {s.name: self.session.empty(s.name, sizes) for s in self.record.outputs}

    def run(self) -> None:
        self.session.run(self.inputs, self.outputs)

    def results(self) -> Arrays:
        return {name: self.session.download(tensor) for name, tensor in self.outputs.items()}

    def close(self) -> None:
        self.session.close()
        self.inputs.clear()
        self.outputs.clear()


@pytest.fixture
def loop(folder: Path, device: Device) -> Iterator[Loop]:
    loop = Loop(folder, device)
    yield loop
    if loop.inputs:
        loop.close()


def test_runs_with_the_same_tensors_share_a_context_and_a_graph(loop: Loop, gpu: Gpu, bundle: Path) -> None:
    for _ in range(5):
        loop.run()
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    assert gpu.log.count(("context", "transformer")) == 1
    assert gpu.captures in (["cuda"], ["transformer"])


def test_what_is_copied_in_is_what_is_read(loop: Loop, bundle: Path) -> None:
    loop.run()
    loop.run()
    other = values(loop.record.inputs, loop.sizes, seed=1)["latents"]
    loop.session.copy(loop.session.upload(other), loop.inputs["latents"])
    loop.run()
    expected = on_cpu(bundle, "transformer", loop.arrays | {"latents": other}, loop.sizes)
    assert same(loop.results(), expected)


def test_two_passes_take_turns_without_a_new_context(loop: Loop, gpu: Gpu, bundle: Path) -> None:
    sizes = TRANSFORMER | {"text_tokens": 5, "tokens": 41}
    arrays = values(loop.record.inputs, sizes, seed=2)
    inputs = {name: loop.session.upload(array) for name, array in arrays.items()}
    outputs = {s.name: loop.session.empty(s.name, sizes) for s in loop.record.outputs}
    for _ in range(4):
        loop.session.run(inputs, outputs)
        loop.run()
    assert gpu.log.count(("context", "transformer")) == 2
    assert len(gpu.captures) == 2
    assert same({n: loop.session.download(t) for n, t in outputs.items()}, on_cpu(bundle, "transformer", arrays, sizes))
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))


def test_a_context_that_is_bound_anew_forgets_its_graph(folder: Path, device: Device, gpu: Gpu, bundle: Path) -> None:
    loop = Loop(folder, device)
    for turn in range(4):
        arrays = values(loop.record.inputs, loop.sizes, turn)
        loop.inputs = {name: loop.session.upload(array) for name, array in arrays.items()}
        for _ in range(3):
            loop.run()
        assert same(loop.results(), on_cpu(bundle, "transformer", arrays, loop.sizes))
    assert gpu.log.count(("context", "transformer")) == 2
    assert len(gpu.captures) == 4
    loop.close()


@pytest.mark.parametrize("backend", ["tensorrt"])
def test_a_graph_that_is_under_way_is_waited_for(folder: Path, device: Device, gpu: Gpu, bundle: Path) -> None:
    """A third set of tensors takes the context of the first, whose graph may still be running."""
    loop = Loop(folder, device)
    sets = []
    for turn in range(3):
        arrays = values(loop.record.inputs, loop.sizes, turn)
        inputs = {name: loop.session.upload(array) for name, array in arrays.items()}
        sets.append((arrays, inputs, {s.name: loop.session.empty(s.name, loop.sizes) for s in loop.record.outputs}))
    for _, inputs, outputs in (sets[0], sets[1], sets[0], sets[1], sets[1], sets[0], sets[2]):
        loop.session.run(inputs, outputs)
    assert "launch" in [name for name, _ in gpu.log]
    for arrays, _, outputs in sets:
        found = {name: loop.session.download(tensor) for name, tensor in outputs.items()}
        assert same(found, on_cpu(bundle, "transformer", arrays, loop.sizes))
    loop.close()


def test_the_context_that_was_bound_first_is_bound_anew(folder: Path, device: Device, gpu: Gpu) -> None:
    """So the two passes of one batch make room for those of the next one in their order."""
    loop = Loop(folder, device)
    sets = [{name: loop.session.upload(array) for name, array in loop.arrays.items()} for _ in range(3)]
    for inputs in (sets[0], sets[1], sets[2], sets[1]):
        for _ in range(2):
            loop.session.run(inputs, loop.outputs)
    assert len(gpu.captures) == 3  # the second set kept its context, and so its graph
    loop.close()


def test_a_context_that_was_bound_halfway_is_not_taken_for_bound(
    folder: Path, device: Device, gpu: Gpu, bundle: Path
) -> None:
    session, record = session_of(folder, "vae_decoder", device), record_of(folder, "vae_decoder")

    def tensors(rows: int) -> tuple[Arrays, dict[str, Any], dict[str, Any], dict[str, int]]:
        sizes = {"batch": 1, "rows": rows, "columns": 4, "height": rows * 16, "width": 64}
        arrays = values(record.inputs, sizes, rows)
        inputs = {name: session.upload(array) for name, array in arrays.items()}
        return arrays, inputs, {"image": session.empty("image", sizes)}, sizes

    small, large = tensors(2), tensors(9)
    session.run(small[1], small[2])
    gpu.memory_bytes = gpu.in_use
    with pytest.raises(EngineError, match="out of memory"):
        session.run(large[1], large[2])
    gpu.memory_bytes = 1 << 34
    other = {"latents": small[0]["latents"] * np.float32(0.5)}
    session.copy(session.upload(other["latents"]), small[1]["latents"])
    session.run(small[1], small[2])
    found = {"image": session.download(small[2]["image"])}
    assert same(found, on_cpu(bundle, "vae_decoder", other, small[3]))
    session.close()


def test_a_larger_arena_is_given_to_contexts_that_had_the_old_one(
    loop: Loop, device: Device, gpu: Gpu, bundle: Path
) -> None:
    for _ in range(3):
        loop.run()
    before = device.arena
    device.reserve(before.size + 1)
    assert before.address not in gpu.blocks
    for _ in range(3):
        loop.run()
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    assert len(gpu.captures) == 2


def test_without_graphs(folder: Path, gpu: Gpu, bundle: Path) -> None:
    device = Device(gpu.capability, cuda_graphs=False)
    loop = Loop(folder, device)
    for _ in range(4):
        loop.run()
    assert gpu.captures == []
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    loop.close()
    device.close()


def test_what_cannot_be_captured_runs_all_the_same(folder: Path, device: Device, gpu: Gpu, bundle: Path) -> None:
    gpu.capturable = False
    loop = Loop(folder, device)
    for _ in range(4):
        loop.run()
    assert "cuda" not in gpu.captures
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    loop.close()


def test_what_runs_once_is_not_captured(folder: Path, device: Device, gpu: Gpu) -> None:
    session, record = session_of(folder, "vae_encoder", device), record_of(folder, "vae_encoder")
    sizes = {"batch": 1, "height": 64, "width": 32, "rows": 4, "columns": 2}
    inputs = {name: session.upload(array) for name, array in values(record.inputs, sizes).items()}
    outputs = {s.name: session.empty(s.name, sizes) for s in record.outputs}
    for _ in range(3):
        session.run(inputs, outputs)
    assert gpu.captures == []
    session.close()


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


# Profiles, weight streaming


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
    said = str(problem.value)
    assert said.startswith("latents of vae_decoder is 1x3x4x64, expected 1x1x1x64 to 1x3x3x64; use another size")
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


# The cache of kernels


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


# Refused


def test_a_file_that_is_no_engine(folder: Path, device: Device, backend: str) -> None:
    (folder / "vision.engine").write_bytes(b"\x00" * 100)
    with pytest.raises(BundleError) as problem:
        TensorRtSession(folder, record_of_any_size(folder, "vision"), device)
    module = backend.replace("-", "_")
    assert f"{module} 1.7.1 cannot load {folder}/vision.engine (header.magicTag" in str(problem.value)
    assert str(problem.value).endswith("build the bundle again with `qie build`")


@pytest.mark.parametrize("key", ["version", "capability"])
def test_an_engine_of_another_version_or_gpu(folder: Path, device: Device, key: str) -> None:
    record = change_file(folder, "vision", **{key: "9.9"})
    with pytest.raises(BundleError, match=rf"cannot load .*vision.engine \({key} is 9\.9, expected"):
        TensorRtSession(folder, record, device)


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
         "latents as input float32 -1x-1x-1x32, the manifest as input float32 -1x-1x-1x64"),
        ({"inputs": [["latents", "int64", [-1, -1, -1, 64]]]}, "latents as input int64 -1x-1x-1x64"),
        ({"inputs": [["noise", "float32", [-1, -1, -1, 64]]]}, "latents as nothing, the manifest as input float32"),
        ({"outputs": [["image", "uint8", [-1, -1, 3]]]}, "image as output uint8 of 3 dims, the manifest as .* 4 dims"),
        ({"outputs": [["image", "uint8", [-1] * 4], ["more", "uint8", [1]]]}, "more as .*, the manifest as nothing"),
        ({"host": ["latents"]}, "latents as input float32 -1x-1x-1x64 on the host"),
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
    with pytest.raises(BundleError, match="tensorrt_rtx .* cannot load .*magicTag"):
        TensorRtSession(tmp_path, record, Device("8.9"))


# The fake is as strict as it says


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
