"""Bundles whose engines are yet to be built on the machine of the GPU."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.packing import build as packing
from qie.compiler.packing.finish import finish_bundle
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.bundle.sealed import write_manifest
from qie.engines.errors import BackendMissingError, BuildError, BundleError
from qie.engines.files import sha256_of
from qie.engines.sessions.choose import choose_engines
from tests.support.bundles import build, planned
from tests.support.small_graphs import Worker, small


@pytest.fixture(scope="module")
def graphs_alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built for the H100: nothing here builds engines for Hopper; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("h100") / "bundle", small("h100")).path


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built for the A100 without one: engines, and graphs; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("a100") / "bundle", small("a100")).path


@pytest.fixture
def unfinished(graphs_alone: Path, tmp_path: Path) -> Bundle:
    """Graphs alone."""
    bundle = open_bundle(shutil.copytree(graphs_alone, tmp_path / "bundle"))
    assert bundle.manifest.engines == ()
    assert [graph.component for graph in bundle.manifest.graphs] == list(COMPONENTS)
    verify(bundle)
    return bundle


def test_graphs_alone_do_not_run(unfinished: Bundle) -> None:
    with pytest.raises(BundleError, match="has no engine for vision yet; run `qie build --finish"):
        choose_engines(unfinished)


def test_a_recipe_of_schema_1_asks_for_a_new_build(unfinished: Bundle) -> None:
    manifest = unfinished.manifest
    toml = manifest.recipe.toml.replace("schema = 2", "schema = 1")
    old = replace(unfinished, manifest=replace(manifest, recipe=replace(manifest.recipe, toml=toml)))
    with pytest.raises(BundleError, match=r"schema 1, expected 2\); build the bundle again with `qie build`$"):
        finish_bundle(old)


def test_finishing_needs_the_gpu(unfinished: Bundle) -> None:
    before = unfinished.manifest
    with pytest.raises(BackendMissingError, match="vision cannot be built here: tensorrt is not installed; run"):
        finish_bundle(unfinished)
    assert open_bundle(str(unfinished.path)).manifest == before


@pytest.fixture
def left_from_a100(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Engines and graphs for the A100. From then on TensorRT for RTX plays the TensorRT of a machine with it."""
    bundle = open_bundle(shutil.copytree(both, tmp_path / "bundle"))
    there = replace(BACKENDS["tensorrt"], build_module="tensorrt_rtx", builds_on_gpu=False)
    monkeypatch.setitem(BACKENDS, "tensorrt", there)
    return bundle


def test_a_bundle_that_was_replaced_meanwhile_stays(left_from_a100: Bundle, tmp_path: Path) -> None:
    path = left_from_a100.path

    def replace_it(*_: object) -> None:
        if not (tmp_path / "aside").exists():
            shutil.copytree(path, tmp_path / "other")
            path.rename(tmp_path / "aside")
            (tmp_path / "other").rename(path)

    with pytest.raises(BuildError, match="bundle was changed meanwhile; start again"):
        finish_bundle(left_from_a100, progress=replace_it)
    assert open_bundle(path).manifest == left_from_a100.manifest


def test_finishing(left_from_a100: Bundle) -> None:
    """The preferred engines come first, the others stay, the graphs go."""
    before, calls = left_from_a100.manifest, set()
    finished = finish_bundle(left_from_a100, progress=lambda what, done, total: calls.add(what))
    engines = finished.manifest.engines
    assert [(e.component, e.backend) for e in engines[:5]] == [(component, "tensorrt") for component in COMPONENTS]
    assert engines[5:] == before.engines
    assert finished.manifest.graphs == ()
    assert calls == {f"compile {component}" for component in COMPONENTS}
    assert list(finished.path.glob("*.onnx")) == []
    assert replace(finished.manifest, engines=before.engines, graphs=before.graphs) == before
    verify(finished)
    with pytest.raises(BuildError, match="has every engine that its recipe prefers; run edits"):
        finish_bundle(finished)


def test_finishing_in_parts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part waits for its engine, and the engines of all parts replace the graphs."""
    recipe = small("a100")
    transformer = replace(recipe.components.transformer, parts=2)
    recipe = replace(recipe, components=replace(recipe.components, transformer=transformer))
    bundle = build(checkpoint, tmp_path / "bundle", recipe)
    names = ["transformer.0.onnx", "transformer.1.onnx"]
    assert [graph.path for graph in bundle.manifest.graphs if graph.component == "transformer"] == names
    there = replace(BACKENDS["tensorrt"], build_module="tensorrt_rtx", builds_on_gpu=False)
    monkeypatch.setitem(BACKENDS, "tensorrt", there)
    finished = finish_bundle(bundle)
    built = [(e.backend, e.part, e.path) for e in finished.manifest.engines if e.component == "transformer"]
    assert built == [
        (backend, part, f"transformer.{part}.{backend}-8.0.engine")
        for backend in ("tensorrt", "tensorrt-rtx")
        for part in (0, 1)
    ]
    assert finished.manifest.graphs == () and not list(finished.path.glob("*.onnx"))
    verify(finished)


def test_what_cannot_be_built_here_waits(left_from_a100: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the language model for TensorRT-LLM on a machine with TensorRT alone."""
    manifest = left_from_a100.manifest
    graphs = tuple(replace(g, backend="tensorrt-llm") if g.component == "language" else g for g in manifest.graphs)
    write_manifest(replace(manifest, graphs=graphs), left_from_a100.path)
    finished = finish_bundle(open_bundle(left_from_a100.path))
    assert [graph.component for graph in finished.manifest.graphs] == ["language"]
    built = [e.component for e in finished.manifest.engines if e.backend == "tensorrt"]
    assert built == [component for component in COMPONENTS if component != "language"]
    verify(finished)
    with pytest.raises(BackendMissingError, match="language cannot be built here: tensorrt-llm is not installed"):
        finish_bundle(finished)


def test_a_rebuild_keeps_what_was_finished(left_from_a100: Bundle, checkpoint: Path) -> None:
    finished = finish_bundle(left_from_a100)
    calls: set[str] = set()
    plan = planned(checkpoint, finished.path, small("a100"))
    again = packing.build(plan, progress=lambda what, done, total: calls.add(what))
    assert again.manifest.engines == finished.manifest.engines[:5]
    assert not any(what.startswith("compile") for what in calls)


def test_a_failed_finish_leaves_the_bundle_as_it_was(left_from_a100: Bundle, worker: Worker) -> None:
    before = {path: sha256_of(path) for path in left_from_a100.path.rglob("*") if path.is_file()}
    worker("sys.exit('broken')")
    with pytest.raises(BuildError, match=r"built no engine of vision \(broken\)"):
        finish_bundle(left_from_a100)
    assert {path: sha256_of(path) for path in left_from_a100.path.rglob("*") if path.is_file()} == before
    assert [path.name for path in left_from_a100.path.parent.iterdir() if path.is_dir()] == [left_from_a100.path.name]


def test_a_damaged_bundle_is_not_finished(left_from_a100: Bundle) -> None:
    file = left_from_a100.path / "transformer.weights"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged; build the bundle again"):
        finish_bundle(left_from_a100)


def test_the_command(left_from_a100: Bundle, qie: Callable[..., CompletedProcess[str]]) -> None:
    path = left_from_a100.path
    shown = qie("build", "--finish", path, "--dry-run").stdout
    assert shown.split() == [str(path), "lacks", *", ".join(f"{c} for tensorrt" for c in COMPONENTS).split()]
    planned_json = json.loads(qie("build", "--finish", path, "--dry-run", "--json").stdout)
    assert planned_json["components"][0] == {"component": "vision", "part": 0, "backend": "tensorrt"}
    assert open_bundle(str(path)).manifest == left_from_a100.manifest
    done = json.loads(qie("build", "--finish", path, "--json").stdout)
    assert (done["bundle"], done["unfinished"]) == (str(path), [])
    assert qie("build", "--finish", path).returncode == 2  # nothing is left


def test_the_gpu_to_build_on_reaches_the_builder(
    left_from_a100: Bundle, checkpoint: Path, qie: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``--finish`` and by a build; what no builder can use is an error that names the option."""
    seen: list[tuple[str, int | None]] = []

    class Watched:
        def unavailable(self, recipe: Recipe, device: int | None = None) -> str | None:
            seen.append(("unavailable", device))
            return None if device == 1 else f"GPU {device} is another one; choose GPU 1"

        def version(self) -> str:
            return "1"

        def build(self, *words: Any, device: int | None = None, **more: Any) -> Any:
            seen.append(("build", device))
            raise BuildError("stopped; go on")

    monkeypatch.setitem(BUILDERS, "tensorrt", Watched())
    path = left_from_a100.path
    refused = qie("build", "--finish", path, "--device", "0")
    assert refused.stderr.endswith("cannot be built here: GPU 0 is another one; choose GPU 1 (--device)\n")
    assert "stopped" in qie("build", "--finish", path, "--device", "1").stderr
    assert set(seen) == {("unavailable", 0), ("unavailable", 1), ("build", 1)}
    seen.clear()
    (path.parent / "mine.toml").write_text('extends = "a100"\n[shapes]\nmin_side = 32\n')
    done = qie("build", checkpoint, "--gpu", path.parent / "mine.toml", "--out", path.parent / "built", "--device", "1")
    assert "stopped" in done.stderr
    assert set(seen) == {("unavailable", 1), ("build", 1)}


def test_the_build_says_what_is_yet_to_be_built(
    checkpoint: Path, tmp_path: Path, qie: Callable[..., CompletedProcess[str]]
) -> None:
    plain = '[components.transformer]\nscheme = "none"\n'
    (tmp_path / "mine.toml").write_text(f'extends = "h100"\n[shapes]\nmin_side = 32\n{plain}')
    done = qie("build", checkpoint, "--gpu", tmp_path / "mine.toml", "--out", tmp_path / "out")
    assert "tensorrt builds only on the machine with the GPU (H100 80GB): the graphs" in done.stdout
    assert f"on the machine with the GPU, run: qie build --finish {tmp_path / 'out'}\n" in done.stdout
    assert "edit with" not in done.stdout
