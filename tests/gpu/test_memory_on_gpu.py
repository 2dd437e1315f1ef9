"""GPU memory: the arena against TensorRT and the manifest, sequential engines, and nothing left after closing."""

import gc
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import Bundle
from qie.engines.editing.editor import Editor
from qie.engines.sessions import cuda
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.gpu_bundles import build_for_gpu, edit_request

MIB = 1 << 20
CONTEXT = 64 * MIB
"""What the driver and TensorRT may keep for kernels and handles that were used once."""


def used() -> int:
    free, total = cuda.memory()
    return total - free


def test_the_manifests_activations_are_tensorrts(on_tensorrt: Bundle) -> None:
    """The activation bytes written at build time, without a GPU, are those of a run of the largest shapes."""
    device = open_device(on_tensorrt.manifest.engines)
    assert device is not None
    for record in on_tensorrt.manifest.engines:
        session = load(on_tensorrt.path, record, device)
        assert isinstance(session, TensorRtSession)
        needed = session.activation_bytes
        session.close()
        if record.activation_bytes is not None:
            assert needed <= record.activation_bytes * 1.02, record.component
            assert needed >= record.activation_bytes * 0.5, record.component
    device.close()


def test_the_arena_is_one_and_within_the_manifests_largest(on_tensorrt: Bundle) -> None:
    editor = Editor(on_tensorrt)
    editor.edit(edit_request(seeds=[1, 2, 3, 4]))
    device, needs = editor.stages.device, []
    for component in editor.stages.loaded:
        with editor.stages.session(component) as session:
            assert isinstance(session, TensorRtSession)
            needs.append(session.activation_bytes)
    assert device is not None
    assert len(needs) == 5
    assert 0 < device.arena.size <= max(needs)
    editor.close()


def test_edits_do_not_grow(on_tensorrt: Bundle) -> None:
    editor = Editor(on_tensorrt)
    for _ in range(2):
        editor.edit(edit_request())
    before = used()
    for _ in range(5):
        editor.edit(edit_request())
    assert used() <= before + MIB
    editor.close()


def test_a_closed_editor_keeps_nothing(on_tensorrt: Bundle) -> None:
    Editor(on_tensorrt).edit(edit_request())
    gc.collect()
    editor = Editor(on_tensorrt)
    editor.edit(edit_request())
    editor.close()
    gc.collect()
    before = used()
    for _ in range(3):
        editor = Editor(on_tensorrt)
        editor.edit(edit_request())
        editor.close()
        gc.collect()
    assert used() <= before + CONTEXT


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_one_after_another_takes_less(wide_checkpoint: Path, tmp_path: Path, backend: str) -> None:
    """Sequential residency lowers the peak by almost the weights of all engines but the largest."""
    peaks = {}
    for residency in ("resident", "sequential"):
        bundle = build_for_gpu(wide_checkpoint, tmp_path / residency, backend, residency)
        editor, samples = Editor(bundle), []
        before = used()
        editor.edit(edit_request(), progress=lambda *_, samples=samples: samples.append(used()))
        peaks[residency] = max(samples) - before
        editor.close()
        gc.collect()
    weights = [sum(file.bytes for file in engine.files) for engine in bundle.manifest.engines]
    assert peaks["resident"] > sum(weights) * 0.9
    assert peaks["sequential"] < peaks["resident"] - (sum(weights) - max(weights)) * 0.7
