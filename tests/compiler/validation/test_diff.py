"""Differences between real bundles: recipes, engines, graphs, weights, velocities."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.compiler.validation.diff.compare import compare
from qie.compiler.validation.diff.diff import BundleDiff, EngineDiff, diff_bundles
from qie.compiler.validation.diff.graph import distance
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import file_record
from qie.engines.errors import BundleError, GoldenError
from qie.engines.progress import no_progress
from qie.engines.records import to_plain
from tests.support.bundles import build, linked
from tests.support.damage import change_manifest, flip
from tests.support.golden_cases import write_own_golden

RECIPE = 'extends = "cpu"\n[components.transformer]\nscheme = "{scheme}"\n[gates.edits]\npsnr = 20.0\n'

Built = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The pocket model for the CPU, with a scheme; not to be changed."""
    folder, bundles = tmp_path_factory.mktemp("pocket"), dict[str, Bundle]()

    def get(scheme: str) -> Bundle:
        if scheme not in bundles:
            recipe = "cpu" if scheme == "none" else RECIPE.format(scheme=scheme)
            bundles[scheme] = build("pocket", folder / f"pocket-{scheme}", recipe)
        return bundles[scheme]

    return get


def transformer(diff: BundleDiff) -> EngineDiff:
    (engine,) = [engine for engine in diff.engines if engine.component == "transformer"]
    return engine


def table(changes: Any) -> dict[str, tuple[Any, Any]]:
    return {change.key: (change.old, change.new) for change in changes}


def test_a_bundle_has_no_difference_to_itself(bundle: Path) -> None:
    found = diff_bundles(open_bundle(bundle), open_bundle(bundle))
    assert not found.differs
    assert found.same_model
    assert [engine.component for engine in found.engines] == [
        "vision", "language", "vae_encoder", "transformer", "vae_decoder",
    ]  # fmt: skip
    assert not any(engine.differs or engine.build for engine in found.engines)


def test_two_builds_differ_in_the_figures_of_the_build_alone(
    checkpoint: Path, plain_bundle: Path, tmp_path: Path
) -> None:
    old, new = open_bundle(str(linked(plain_bundle, tmp_path / "old"))), build(checkpoint, tmp_path / "new")
    manifest = json.loads((new.path / "manifest.json").read_text())
    change_manifest(new.path, engines=[engine | {"build_seconds": 99.0} for engine in manifest["engines"]])
    found = diff_bundles(old, open_bundle(new.path))
    assert not found.differs
    assert [table(engine.build)["seconds"][1] for engine in found.engines] == [99.0] * 5


def test_a_scheme_changes_recipe_engine_and_graph(built: Built) -> None:
    found = diff_bundles(built("none"), built("w8a16"))
    assert found.differs
    recipe = table(found.recipe)
    assert recipe.keys() == {"components.transformer.scheme", "gates.edits.psnr"}
    assert recipe["components.transformer.scheme"] == ("none", "w8a16")
    assert recipe["gates.edits.psnr"][1] == 20.0
    assert not (found.model or found.loras or found.settings or found.modulation)
    assert [engine.component for engine in found.engines if engine.differs] == ["transformer"]
    changes = table(transformer(found).changes)
    assert changes["scheme"] == (None, "w8a16")
    assert (changes["quantized"], changes["linears"]) == ((None, 56), (None, 59))
    old, new = changes["bytes"]
    assert new < old / 3
    assert {"key", "transformer.onnx", "transformer.weights"} < changes.keys()
    assert "precision" not in changes
    graph = transformer(found).graph
    assert graph is not None
    assert table(graph.nodes) == {"DequantizeLinear": (None, 56)}
    assert table(graph.dtypes)["int8"] == (None, 56)
    assert len(graph.weights) == 56
    weight = next(w for w in graph.weights if w.name == "transformer_blocks.0.img_mlp.net.2.weight")
    assert (weight.old, weight.new) == ("float32 768x192", "int8 768x192")


@pytest.mark.parametrize(("scheme", "bound"), [("w8a16", 0.013), ("w4a16", 0.2), ("fp8", 0.03)])
def test_quantized_weights_are_compared_times_their_scales(built: Built, scheme: str, bound: float) -> None:
    graph = transformer(diff_bundles(built("none"), built(scheme))).graph
    assert graph is not None
    errors = [weight.relative_l2 for weight in graph.weights if weight.old is not None]
    assert len(errors) >= 38
    assert all(error is not None and bound / 10 < error < bound for error in errors), errors


def test_smoothing_reaches_the_modulation(built: Built) -> None:
    found = diff_bundles(built("none"), built("int8-smooth"))
    assert {w.name.split(".", 2)[2] for w in found.modulation} >= {"img_mod.1.weight", "txt_mod.1.bias"}
    assert all(w.relative_l2 for w in found.modulation)
    assert "modulation weights" in table(found.files)


def test_other_weights_are_another_model(bundle: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", ARCHITECTURES["tiny"], seed=2)
    found = diff_bundles(open_bundle(bundle), build(checkpoint, tmp_path / "other"))
    assert not found.same_model
    assert "digest" in table(found.model)
    assert "name" not in table(found.model)
    graph = transformer(found).graph
    assert graph is not None
    assert not (graph.nodes or graph.dtypes)
    assert all(w.old == w.new and w.relative_l2 is not None and w.relative_l2 > 0.1 for w in graph.weights)
    assert table(found.settings) == {"limits.batch_max": (4, 1)}  # of the fixture


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("none").path, tmp_path / "pocket-copy"))


def reseal(bundle: Path, name: str) -> None:
    """Give the file ``name`` of a bundle the digest of its content."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for engine in manifest["engines"]:
        engine["files"] = [to_plain(file_record(bundle, f["path"])) if f["path"] == name else f
                           for f in engine["files"]]  # fmt: skip
    change_manifest(bundle, engines=manifest["engines"])


def test_one_changed_weight_is_found_among_all(built: Built, copied: Path) -> None:
    name = "transformer_blocks.2.attn.to_q.weight"
    model = onnx.load(copied / "transformer.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    values = np.memmap(copied / "transformer.weights", np.float32, "r+", int(entries["offset"]), tuple(tensor.dims))
    values[:] = values * np.float32(1.5)
    values.flush()
    reseal(copied, "transformer.weights")
    found = diff_bundles(built("none"), open_bundle(copied))
    graph = transformer(found).graph
    assert graph is not None
    (weight,) = graph.weights
    assert weight.name == name
    assert weight.relative_l2 == pytest.approx(0.5)
    assert [engine.component for engine in found.engines if engine.differs] == ["transformer"]


def test_a_removed_engine_is_a_difference(built: Built, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    change_manifest(copied, engines=[e for e in manifest["engines"] if e["component"] != "vision"])
    found = diff_bundles(built("none"), open_bundle(copied))
    assert [(e.component, e.old, e.new) for e in found.engines if e.differs] == [("vision", "onnxruntime/cpu", None)]


def test_engines_for_several_targets_are_compared_by_target(built: Built, copied: Path) -> None:
    """A bundle may have a second engine of a component, in any order."""
    manifest = json.loads((copied / "manifest.json").read_text())
    others = [e | {"compute_capability": "8.9", "precision": "bfloat16"} for e in manifest["engines"]]
    change_manifest(copied, engines=others + manifest["engines"])
    found = diff_bundles(built("none"), open_bundle(copied))
    assert Counter((e.old, e.new) for e in found.engines) == {
        ("onnxruntime/cpu", "onnxruntime/cpu"): 5,
        (None, "onnxruntime/8.9"): 5,
    }
    assert not any(e.changes for e in found.engines)


def test_another_target_is_compared_with_what_is_left(built: Built, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    change_manifest(copied, engines=[e | {"backend_version": "9", "compute_capability": "8.9"}
                                     for e in manifest["engines"]])  # fmt: skip
    found = diff_bundles(built("none"), open_bundle(copied))
    assert table(transformer(found).changes)["target"] == ("onnxruntime/cpu", "onnxruntime/8.9")
    assert table(transformer(found).changes)["backend version"][1] == "9"


def test_damaged_weights_are_damage_and_no_difference(built: Built, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    for engine in manifest["engines"]:
        for file in engine["files"]:
            if file["path"] == "transformer.weights":
                file["sha256"] = "0" * 64
    change_manifest(copied, engines=manifest["engines"])
    with pytest.raises(BundleError, match=r"transformer\.weights is damaged"):
        diff_bundles(built("none"), open_bundle(copied))


@pytest.mark.parametrize("name", ["transformer.weights", "modulation.weights", "vae_decoder.weights"])
def test_a_damaged_file_that_nobody_sealed_is_damage(built: Built, copied: Path, name: str) -> None:
    """The manifest says that it is equal; it is read all the same, of either bundle."""
    flip(copied / name)
    with pytest.raises(BundleError, match=f"{name} is damaged; build the bundle again"):
        diff_bundles(built("none"), open_bundle(copied))
    with pytest.raises(BundleError, match=f"{name} is damaged; build the bundle again"):
        diff_bundles(open_bundle(copied), built("none"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("location", "../../../etc/passwd"), ("location", "vision.weights"), ("offset", "99999999999"), ("offset", "-4"),
     ("length", "4"), ("length", "x")],
)  # fmt: skip
def test_weights_are_read_from_their_own_place_alone(built: Built, copied: Path, key: str, value: str) -> None:
    model = onnx.load(copied / "transformer.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "img_in.weight")
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    (copied / "transformer.onnx").write_bytes(model.SerializeToString())
    reseal(copied, "transformer.onnx")
    with pytest.raises(BundleError, match="is not where"):
        diff_bundles(built("none"), open_bundle(copied))


def test_what_is_no_graph_is_refused(built: Built, copied: Path) -> None:
    (copied / "transformer.onnx").write_bytes(b"\xff" * 100)
    reseal(copied, "transformer.onnx")
    with pytest.raises(BundleError, match="is no ONNX graph"):
        diff_bundles(built("none"), open_bundle(copied))


def test_a_recipe_that_is_no_toml_is_refused(built: Built, copied: Path) -> None:
    recipe = json.loads((copied / "manifest.json").read_text())["recipe"]
    change_manifest(copied, recipe=recipe | {"toml": "x ="})
    with pytest.raises(BundleError, match="is no TOML"):
        diff_bundles(built("none"), open_bundle(copied))


def test_the_distance_of_arrays() -> None:
    ones = np.ones((3, 4), np.float32)
    assert distance(2 * ones, ones) == 1.0
    assert distance(ones, ones) == 0.0
    assert distance(ones, 0 * ones) is None
    assert distance(ones.T, ones) is None
    assert distance(np.nan * ones, ones) is None


def test_velocities_are_compared_along_the_reference(built: Built, tmp_path: Path) -> None:
    """The golden file is a run of the first bundle, which is therefore exact."""
    golden = write_own_golden(built("none"), tmp_path / "golden.safetensors", recorded=(0, 3))
    calls: list[tuple[str, int, int]] = []
    found = compare(built("none"), built("w4a16"), golden=golden, progress=lambda *call: calls.append(call)).velocity
    assert (found.golden, found.not_run) == ("golden.safetensors", None)
    assert [(s.case, s.step, s.passed) for s in found.steps] == [
        ("red", 0, "conditional"), ("red", 0, "negative"), ("red", 3, "conditional"), ("red", 3, "negative"),
    ]  # fmt: skip
    for step in found.steps:
        assert step.old == 0.0
        assert step.between == step.new
        assert step.new is not None and 1e-3 < step.new < 0.5
    assert calls[-1] == ("velocity", 2, 2)


def test_equal_velocities_are_no_difference(built: Built, tmp_path: Path) -> None:
    golden = write_own_golden(built("none"), tmp_path / "golden.safetensors", recorded=(1,), guidance=1.0)
    found = compare(built("none"), built("none"), golden=golden)
    (step,) = found.velocity.steps
    assert (step.step, step.passed, step.between) == (1, "conditional", 0.0)
    assert not found.differs


def test_velocities_need_one_model(built: Built, bundle: Path, tmp_path: Path) -> None:
    golden = write_own_golden(built("none"), tmp_path / "golden.safetensors", recorded=(0,), guidance=1.0)
    found = compare(built("none"), open_bundle(bundle), golden=golden).velocity
    assert found.not_run is not None and found.not_run.startswith("tiny-cpu is of another model than pocket-none")
    assert found.steps == ()
    with pytest.raises(GoldenError, match="with other weights or LoRAs than tiny-cpu") as refused:
        compare(open_bundle(bundle), built("none"), golden=golden)
    assert refused.value.option == "golden"
    flip(golden)
    with pytest.raises(GoldenError, match="damaged"):
        compare(built("none"), built("none"), golden=golden)


def test_velocities_need_engines_that_run_here(built: Built, copied: Path, tmp_path: Path) -> None:
    golden = write_own_golden(built("none"), tmp_path / "golden.safetensors", recorded=(0,), guidance=1.0)
    manifest = json.loads((copied / "manifest.json").read_text())
    change_manifest(copied, engines=[e | {"compute_capability": "1.0"} for e in manifest["engines"]])
    found = compare(built("none"), open_bundle(copied), golden=golden).velocity
    assert found.not_run is not None and "built for onnxruntime/1.0" in found.not_run


def test_without_a_golden_file_the_reason_is_given(bundle: Path) -> None:
    opened = open_bundle(bundle)
    found = compare(opened, opened, progress=no_progress)
    assert found.velocity.not_run == "there is no golden file of the model; record one with `qie golden` and name it"
    assert not replace(found, velocity=found.velocity).differs
