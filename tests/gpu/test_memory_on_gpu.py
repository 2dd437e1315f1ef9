"""GPU memory: the arena against TensorRT and the manifest, sequential engines, and nothing left after closing."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.sessions import cuda
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.tensorrt.session import TensorRtSession
from tests.support.editors import uncached_editor
from tests.support.gpu_bundles import build_for_gpu, edit_request

MIB = 1 << 20
KEPT = 64 * MIB
"""What the driver and TensorRT may keep: kernels that were used once, handles, and what their allocators round up."""

Measured = Callable[[str], None]


def used() -> int:
    free, total = cuda.memory()
    return total - free


def test_the_manifests_activations_are_tensorrts(on_tensorrt: Bundle, measured: Measured) -> None:
    """The activation bytes written at build time, without a GPU, are about those of a run of the largest shapes."""
    device = open_device(on_tensorrt.manifest.engines)
    assert device is not None
    shares = {}
    for record in on_tensorrt.manifest.engines:
        session = load(on_tensorrt.path, record, device)
        assert isinstance(session, TensorRtSession)
        if record.activation_bytes is not None:
            shares[record.component] = session.activation_bytes / record.activation_bytes
            measured(f"{record.component} takes {session.activation_bytes:,} of {record.activation_bytes:,} bytes")
        session.close()
    device.close()
    assert all(0.25 <= share <= 1.1 for share in shares.values()), shares


def test_the_arena_is_one_and_within_the_manifests_largest(on_tensorrt: Bundle) -> None:
    editor = uncached_editor(on_tensorrt)
    editor.edit(edit_request(seeds=[1, 2, 3, 4]))
    device, needs = editor.stages.device, [e.activation_bytes or 0 for e in on_tensorrt.manifest.engines]
    for component in editor.stages.loaded:
        with editor.stages.session(component) as session:
            assert isinstance(session, TensorRtSession)
            needs.append(session.activation_bytes)
    assert device is not None
    assert len(needs) == 2 * len(COMPONENTS)
    assert 0 < device.arena.size <= max(needs)
    editor.close()


def test_edits_do_not_grow(on_tensorrt: Bundle, measured: Measured) -> None:
    """The second half of many edits takes no more than the first half did."""
    editor, samples = uncached_editor(on_tensorrt), []
    for _ in range(12):
        editor.edit(edit_request())
        samples.append(used())
    editor.close()
    measured(f"MiB in use after each edit: {', '.join(f'{sample / MIB:.0f}' for sample in samples)}")
    assert max(samples[6:]) <= max(samples[:6]) + KEPT


def test_a_closed_editor_keeps_nothing(on_tensorrt: Bundle, measured: Measured) -> None:
    uncached_editor(on_tensorrt).edit(edit_request())
    gc.collect()
    samples = []
    for _ in range(4):
        editor = uncached_editor(on_tensorrt)
        editor.edit(edit_request())
        editor.close()
        gc.collect()
        samples.append(used())
    measured(f"MiB in use after each editor: {', '.join(f'{sample / MIB:.0f}' for sample in samples)}")
    assert max(samples[1:]) <= samples[0] + KEPT


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_one_after_another_takes_less(wide_checkpoint: Path, tmp_path: Path, backend: str, measured: Measured) -> None:
    """Sequential residency lowers the peak by almost the weights of all engines but the largest."""
    peaks = {}
    for residency in ("resident", "sequential"):
        bundle = build_for_gpu(wide_checkpoint, tmp_path / residency, backend, residency)
        editor, samples = uncached_editor(bundle), []
        before = used()
        editor.edit(edit_request(), progress=lambda *_, samples=samples: samples.append(used()))
        peaks[residency] = max(samples) - before
        editor.close()
        gc.collect()
    weights = [sum(file.bytes for file in engine.files) for engine in bundle.manifest.engines]
    measured(f"peaks of {peaks} bytes, weights of {sum(weights):,}, {max(weights):,} of them in one engine")
    assert peaks["resident"] > sum(weights) * 0.9
    assert peaks["sequential"] < peaks["resident"] - (sum(weights) - max(weights)) * 0.7
