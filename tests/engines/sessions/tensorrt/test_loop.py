"""Repeated runs: contexts, CUDA graphs, and the tensors that they are bound to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.errors import EngineError
from qie.engines.sessions.device import Device, DeviceOptions
from tests.support.fake_gpu import Context, Gpu
from tests.support.tensorrt_sessions import (
    DECODER,
    TRANSFORMER,
    Arrays,
    Loop,
    on_cpu,
    record_of,
    run,
    same,
    session_of,
    values,
)


def test_a_run(folder: Path, bundle: Path, device: Device) -> None:
    session = session_of(folder, "vae_decoder", device)
    record = record_of(folder, "vae_decoder")
    for seed, sizes in enumerate((DECODER, DECODER | {"rows": 2}, {"batch": 1, "rows": 5, "columns": 3}, DECODER)):
        sizes = sizes | {"height": sizes["rows"] * 16, "width": sizes["columns"] * 16}
        arrays = values(record.inputs, sizes, seed)
        assert same(run(session, arrays, sizes, record.outputs), on_cpu(bundle, "vae_decoder", arrays, sizes))
    session.close()


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
        results = {name: loop.session.download(tensor) for name, tensor in outputs.items()}
        assert same(results, on_cpu(bundle, "transformer", arrays, loop.sizes))
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
    folder: Path, device: Device, gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Context) -> int:
        raise EngineError("no shapes; none")

    session, record = session_of(folder, "vae_decoder", device), record_of(folder, "vae_decoder")

    def tensors(rows: int) -> tuple[Arrays, dict[str, Any], dict[str, Any], dict[str, int]]:
        sizes = {"batch": 1, "rows": rows, "columns": 4, "height": rows * 16, "width": 64}
        arrays = values(record.inputs, sizes, rows)
        inputs = {name: session.upload(array) for name, array in arrays.items()}
        return arrays, inputs, {"image": session.empty("image", sizes)}, sizes

    small, large = tensors(2), tensors(9)
    session.run(small[1], small[2])
    gpu.memory_bytes = gpu.in_use
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="no shapes"):
        patch.setattr(Context, "update_device_memory_size_for_shapes", refuse)
        session.run(large[1], large[2])
    gpu.memory_bytes = 1 << 34
    other = {"latents": small[0]["latents"] * np.float32(0.5)}
    session.copy(session.upload(other["latents"]), small[1]["latents"])
    session.run(small[1], small[2])
    results = {"image": session.download(small[2]["image"])}
    assert same(results, on_cpu(bundle, "vae_decoder", other, small[3]))
    session.close()


@pytest.mark.parametrize("graphs", [None, True, False])
def test_a_larger_arena_is_given_to_contexts_that_had_the_old_one(
    folder: Path, gpu: Gpu, bundle: Path, graphs: bool | None, backend: str
) -> None:
    """With the same tensors: a CUDA graph that TensorRT for RTX finds again would write to the arena that was freed."""
    device = Device(gpu.capability, DeviceOptions(cuda_graphs=graphs))
    loop = Loop(folder, device)
    for _ in range(3):
        loop.run()
    before = device.arena
    device.reserve(before.size + 1)
    assert before.address not in gpu.blocks
    for _ in range(3):
        loop.run()
    assert same(loop.results(), on_cpu(bundle, "transformer", loop.arrays, loop.sizes))
    assert len(gpu.captures) == (2 if graphs or (graphs is None and backend == "tensorrt") else 0)
    loop.close()
    device.close()
    assert gpu.crashes == []


def test_engines_of_tensorrt_for_rtx_are_captured_on_request_alone(folder: Path, gpu: Gpu, backend: str) -> None:
    device = Device(gpu.capability)
    loop = Loop(folder, device)
    for _ in range(3):
        loop.run()
    assert bool(gpu.captures) == (backend == "tensorrt")
    loop.close()
    device.close()


@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_a_run_that_tensorrt_does_not_capture_is_a_warning(
    loop: Loop, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.capturable = False
    with caplog.at_level("INFO", "qie.tensorrt"):
        loop.run()
    assert "not graph capturable" in caplog.text


def test_without_graphs(folder: Path, gpu: Gpu, bundle: Path) -> None:
    device = Device(gpu.capability, DeviceOptions(cuda_graphs=False))
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
