"""A backend is one row, one builder and one session: a made-up one builds a bundle and runs an edit.

It executes a graph with onnxruntime behind a file of its own, so its edits must equal those of onnxruntime.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.doctor import examine
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import BACKENDS, Backend
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import EngineRecord, FileRecord, GraphRecord
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import EngineMismatchError
from qie.engines.files import sha256_of
from qie.engines.sessions.load import SESSIONS
from qie.engines.sessions.onnxruntime import OnnxRuntimeSession
from qie.engines.sessions.session import Session
from tests.support.bundles import build
from tests.support.images import smooth_image

# 1. The row

ABACUS = Backend(
    modules=("onnxruntime",),
    install="pip install abacus",
    on_cpu=True,
    on_gpu=False,
    build_module="onnxruntime",
    build_install="pip install abacus",
    compiles=False,
)

# 2. The builder


class AbacusBuilder:
    """Its engine is a file that names the graph."""

    def version(self) -> str:
        return "1.0"

    def unavailable(self, recipe: Recipe, device: int | None = None) -> str | None:
        return None

    def build(
        self,
        graph: GraphRecord,
        folder: Path,
        *,
        key: str,
        recipe: Recipe,
        device: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> EngineRecord:
        path = folder / f"{graph.component}.abacus"
        path.write_text(json.dumps({"graph": graph.path}))
        file = FileRecord(path=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
        return EngineRecord(
            component=graph.component,
            backend="abacus",
            compute_capability="cpu",
            backend_version=self.version(),
            precision=graph.precision,
            key=key,
            path=path.name,
            files=(file, *graph.files),
            inputs=graph.inputs,
            outputs=graph.outputs,
            parameters=graph.parameters,
            build_seconds=0.0,
            build_peak_bytes=0,
        )


# 3. The session


class AbacusSession(OnnxRuntimeSession):
    """The graph that the engine's file names."""

    loaded: ClassVar[list[str]] = []

    def __init__(self, folder: Path, engine: EngineRecord) -> None:
        graph = json.loads((folder / engine.path).read_text())["graph"]
        super().__init__(folder, replace(engine, path=graph))
        self.loaded.append(engine.component)


def abacus_session(folder: Path, engine: EngineRecord, device: object, index: int | None, threads: int) -> Session:
    assert device is None
    assert index is None
    return AbacusSession(folder, engine)


@pytest.fixture
def abacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "abacus", ABACUS)
    monkeypatch.setitem(BUILDERS, "abacus", AbacusBuilder())
    monkeypatch.setitem(SESSIONS, "abacus", abacus_session)
    monkeypatch.setattr(AbacusSession, "loaded", [])


REQUEST = Request(images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[3], steps=2, guidance=4.0)


@pytest.mark.usefixtures("abacus")
def test_an_edit_with_a_new_backend(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    built = build(checkpoint, tmp_path / "new", 'extends = "cpu"\nbackends = ["abacus", "onnxruntime"]\n')
    opened = open_bundle(built.path)
    assert {(engine.backend, engine.part) for engine in opened.manifest.engines} == {("abacus", 0)}
    with Editor(opened) as editor, Editor(bundle) as expected:
        image = editor.edit(REQUEST).images[0]
        assert np.array_equal(image, expected.edit(REQUEST).images[0])
    assert AbacusSession.loaded == ["vision", "language", "vae_encoder", "transformer", "vae_decoder"]


def test_its_bundle_needs_the_backend(
    checkpoint: Path, tmp_path: Path, abacus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(checkpoint, tmp_path / "new", 'extends = "cpu"\nbackends = ["abacus"]\n')
    monkeypatch.delitem(BACKENDS, "abacus")
    with pytest.raises(EngineMismatchError, match="vision is built for abacus/cpu, which this qie cannot execute"):
        Editor(built)


@pytest.mark.usefixtures("abacus")
def test_the_doctor_knows_it(qie_home: Path) -> None:
    assert "run engines of abacus" in {capability.name for capability in examine().capabilities}
