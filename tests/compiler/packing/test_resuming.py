"""Builds that resume, and builds of weights that are fetched one shard at a time: equal to any other build."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import onnxruntime
from qie.compiler.packing import pieces
from qie.compiler.packing.build import build
from qie.compiler.packing.items import items
from qie.compiler.planning import calibration
from qie.compiler.planning.keys import graph_keys
from qie.compiler.planning.resolve import plan_build
from qie.compiler.synthetic.shards import SyntheticShards
from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.engines.bundle.bundle import Bundle, verify
from qie.engines.bundle.manifest import Manifest
from qie.engines.errors import BuildError, CalibrationError, CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic checkpoint with its shards."""
    return synthesize(plan_synthesis("tiny", tmp_path_factory.mktemp("whole") / "tiny", shard_bytes=300_000))


@pytest.fixture(scope="module")
def on_demand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint without its shards."""
    folder = tmp_path_factory.mktemp("on-demand") / "tiny"
    return synthesize(plan_synthesis("tiny", folder, shard_bytes=300_000, on_demand=True))


@pytest.fixture(scope="module")
def uninterrupted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return content(build(whole, out=tmp_path_factory.mktemp("uninterrupted") / "out"))


def content(bundle: Bundle) -> Manifest:
    """What is in ``bundle``, whose files are as its manifest says, but for the time and memory of its build."""
    verify(bundle)
    engines = [replace(engine, build_seconds=0.0, build_peak_bytes=0) for engine in bundle.manifest.engines]
    return replace(bundle.manifest, engines=tuple(engines))


def test_streamed_weights_make_the_bundle_of_a_folder_and_every_shard_comes_once(
    on_demand: Path, uninterrupted: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = counted(tmp_path, monkeypatch)
    assert content(build(on_demand, out=tmp_path / "out", stream=True)) == uninterrupted
    source = SyntheticShards.open(on_demand)
    assert source is not None and fetched == dict.fromkeys(source.shards, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_that_calibrates_fetches_every_shard_twice(
    on_demand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(calibration, "SAMPLES", 2)
    fetched = counted(tmp_path, monkeypatch)
    recipe = tmp_path / "fp8.toml"
    recipe.write_text('extends = "cpu"\n[components.transformer]\nscheme = "fp8"\n')
    bundle = build(on_demand, gpu=recipe, out=tmp_path / "out", stream=True)
    verify(bundle)
    assert bundle.manifest.calibration is not None
    assert len(fetched) == 6 and set(fetched.values()) == {2}


def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard is fetched, into an empty place in ``folder``."""
    fetched: Counter[str] = Counter()
    fetch = SyntheticShards.fetch

    def count(self: SyntheticShards, path: str, target: Path, **options: Any) -> None:
        fetched[path] += 1
        assert not list(folder.rglob("*.safetensors"))  # the one before is gone
        fetch(self, path, target, **options)

    monkeypatch.setattr(SyntheticShards, "fetch", count)
    return fetched


def test_streaming_a_folder_with_its_weights_reads_them_there(
    whole: Path, uninterrupted: Manifest, tmp_path: Path
) -> None:
    assert content(build(whole, out=tmp_path / "out", stream=True)) == uninterrupted


def test_shards_on_demand_need_streaming(on_demand: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights, and they can be made one shard at a time; stream them"):
        build(on_demand, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fail_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Lets the builder fail at its next engine of the transformer, and keeps what little was made before."""
    monkeypatch.setattr(pieces, "WORTH_KEEPING", 1)
    build_engine = onnxruntime.build

    def fail(problem: BaseException) -> None:
        def failing(graph: Any, *arguments: Any, **options: Any) -> Any:
            if graph.component == "transformer":
                monkeypatch.setattr(onnxruntime, "build", build_engine)
                raise problem
            return build_engine(graph, *arguments, **options)

        monkeypatch.setattr(onnxruntime, "build", failing)

    return fail


@pytest.mark.parametrize("problem", [BuildError("no memory; try again"), KeyboardInterrupt(), MemoryError()])
def test_the_next_build_takes_up_what_was_complete(
    whole: Path,
    uninterrupted: Manifest,
    tmp_path: Path,
    fail_once: Callable[[BaseException], None],
    problem: BaseException,
) -> None:
    fail_once(problem)
    with pytest.raises(type(problem)):
        build(whole, out=tmp_path / "out")
    (left,) = tmp_path.iterdir()
    kept = {file.name: file.stat().st_ino for file in left.glob("*/*.weights")}
    assert {"vision.weights", "language.weights", "vae_encoder.weights"} <= kept.keys()
    assert not list(left.glob("*.work")) and "transformer.weights" not in kept
    bundle = build(whole, out=tmp_path / "out")
    assert content(bundle) == uninterrupted
    assert {name: (bundle.path / name).stat().st_ino for name in kept} == kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_takes_up_nothing_of_other_keys(
    whole: Path, tmp_path: Path, fail_once: Callable[[BaseException], None]
) -> None:
    fail_once(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(whole, out=tmp_path / "out")
    recipe = tmp_path / "other.toml"
    recipe.write_text('extends = "cpu"\n[[schedules]]\nsteps = 6\nguidance = 2.5\n')
    bundle = build(whole, gpu=recipe, out=tmp_path / "out")
    verify(bundle)
    assert bundle.manifest.defaults.steps == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.toml", "out"]


def test_pieces_count_as_room_on_the_disk(
    whole: Path,
    tmp_path: Path,
    fail_once: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_once(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(whole, out=tmp_path / "out")
    needed = sum(file.stat().st_size for file in next(tmp_path.iterdir()).rglob("*"))
    with pytest.raises(BuildError, match=r"building the bundle needs [\d,]+ bytes") as refused:
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
        build(whole, out=tmp_path / "out")
    free = int(str(refused.value).partition(" has ")[2].partition(" free")[0].replace(",", ""))
    assert 0.9 * needed < free <= needed


def test_a_calibration_that_changes_while_it_is_used_is_noticed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QIE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(calibration, "SAMPLES", 2)
    recipe = tmp_path / "fp8.toml"
    recipe.write_text('extends = "cpu"\n[components.transformer]\nscheme = "fp8"\n')
    made = build(whole, gpu=recipe, out=tmp_path / "out")
    kept = made.path / "calibration.npz"
    plan = plan_build(whole, gpu=recipe, out=tmp_path / "other", calibration=kept)
    content = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(content + b" ")
    with pytest.raises(CalibrationError, match="was changed or deleted since it was read; start again"):
        build(plan)
    assert not (tmp_path / "other").exists()


def test_a_tensor_that_is_missing_is_found_before_a_shard_is_fetched(
    on_demand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = counted(tmp_path, monkeypatch)
    tensors = SyntheticShards.tensors

    def lacking(self: SyntheticShards, path: str) -> Any:
        return {name: facts for name, facts in tensors(self, path).items() if name != "decoder.conv_out.bias"}

    monkeypatch.setattr(SyntheticShards, "tensors", lacking)
    with pytest.raises(CheckpointError, match=r"vae tensor 'decoder\.conv_out\.bias' is missing"):
        build(on_demand, out=tmp_path / "out", stream=True)
    assert not fetched


def test_a_piece_for_another_machine_depends_on_its_shapes(whole: Path, tmp_path: Path) -> None:
    """It has the shapes for which the engine is built there."""
    keys = []
    for batch in (2, 3):
        recipe = tmp_path / "h100.toml"
        recipe.write_text(f'extends = "h100"\n[shapes]\nbatch = {{ max = {batch} }}\n[components.transformer]\n'
                          'scheme = "none"\nexclude = []\n')  # fmt: skip
        plan = plan_build(whole, gpu=recipe, out=tmp_path / "out")
        keys.append([item.key for item in items(plan, graph_keys(plan, "digest"))])
    changed = [one != other for one, other in zip(*keys, strict=True)]
    assert changed == [False, False, False, True, False]


def test_progress_of_fetching_never_goes_back_within_a_pass(on_demand: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(
        on_demand,
        out=tmp_path / "out",
        stream=True,
        progress=lambda what, done, total: seen.append((done, total)) if what == "fetch" else None,
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
