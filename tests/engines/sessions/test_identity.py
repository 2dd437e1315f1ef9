"""The identity of an engine: what decides its numbers, on a CPU and on a GPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.editing.stages import Stages
from qie.engines.errors import EngineMismatchError
from qie.engines.sessions import identity as module
from qie.engines.sessions.identity import engine_identity
from tests.support.fake_gpu import Gpu


@pytest.fixture
def engine(bundle: Path) -> EngineRecord:
    return open_bundle(bundle).manifest.engines[0]


def test_an_identity_is_json_and_the_same_again(engine: EngineRecord) -> None:
    identity = engine_identity(engine)
    assert json.loads(identity)["key"] == engine.key
    assert identity == engine_identity(engine) == engine_identity(replace(engine, build_seconds=9.0))


@pytest.mark.parametrize(
    "changes",
    [{"component": "language"}, {"part": 1}, {"backend": "tensorrt"}, {"key": "0" * 64}, {"files": ()}],
)
def test_another_engine_is_another_one(engine: EngineRecord, changes: dict[str, Any]) -> None:
    assert engine_identity(replace(engine, **changes)) != engine_identity(engine)


def test_threads_are_its_own(bundle: Path, engine: EngineRecord) -> None:
    opened = open_bundle(bundle)
    written = [(bundle / file.path).stat().st_mtime_ns for file in engine.files]
    identities = {engine_identity(engine, written=written, threads=threads) for threads in (0, 1, 2)}
    assert len(identities) == 3
    assert {Stages(opened, threads=threads).identity("vision") for threads in (0, 1, 2)} == identities


@pytest.mark.parametrize("component", ["vision", "language"])
def test_a_gpu_and_its_kernels_are_its_own(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: Any
) -> None:
    gpu = Gpu(count=2)
    gpu.install(monkeypatch, "tensorrt")
    opened = open_bundle(gpu.retarget(bundle, tmp_path / "gpu", "tensorrt"))
    plain = Stages(opened, device=0).identity(component)
    assert plain == Stages(opened, device=1).identity(component)  # of the same name
    assert plain == Stages(opened, threads=3).identity(component)
    assert plain != Stages(opened, specialization="eager").identity(component)
    machine: Callable[[], Any] = module.this_machine
    renamed = replace(machine(), gpus=tuple(replace(gpu, name="Another") for gpu in machine().gpus))
    newer = replace(machine(), driver="999")
    for other in (renamed, newer):
        monkeypatch.setattr(module, "this_machine", lambda other=other: other)
        assert plain != Stages(opened, device=0).identity(component)
    with pytest.raises(EngineMismatchError, match="there is no GPU 7"):
        engine_identity(opened.manifest.engines[0], device=7)
