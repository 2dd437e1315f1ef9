"""A validation: what runs here, what does not and why, and what a verdict is worth."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation import run
from qie.compiler.validation.checks.check import Finding, Outcome
from qie.compiler.validation.golden.file import GOLDEN_FILE
from qie.compiler.validation.report import Check, Report
from qie.compiler.validation.run import Options, validate
from qie.compiler.validation.subject import Subject
from qie.engines.errors import BundleError, CheckpointError, GoldenError, RequestError
from tests.support.bundles import build
from tests.support.damage import change_manifest

GPU = """\
schema = 2
gpu = "L40S"
compute_capability = "8.9"
memory_gib = 44
backends = ["onnxruntime"]
"""
"""A recipe whose engines are graphs that nothing here can run: onnxruntime has no GPU."""

TRAJECTORY = Options(level="trajectory")


def named(report: Report, name: str) -> list[Check]:
    found = [check for check in report.checks if check.name == name]
    assert found, name
    return found


@pytest.fixture(scope="module")
def gpu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("pocket", tmp_path_factory.mktemp("gpu") / "pocket-gpu", GPU).path


@pytest.fixture(scope="module")
def sound(pocket_bundle: Path) -> Report:
    return validate(pocket_bundle, TRAJECTORY)


def test_a_sound_bundle_passes(sound: Report) -> None:
    assert sound.verdict == "passed", [check for check in sound.checks if check.result != "passed"]
    assert {check.level for check in sound.checks} == {"structure", "components", "trajectory"}
    cases = {"wide", "tall with guidance", "two images", "five in a row"}
    for name in ("inputs", "vision", "language", "vae_encoder", "transformer", "vae_decoder", "velocity", "latents"):
        assert {check.case for check in named(sound, name)} == cases, name
    assert {check.case for check in named(sound, "blocks")} == {
        "vision", "language", "vae_encoder", "transformer", "vae_decoder",
    }  # fmt: skip
    assert all(check.on.startswith("onnxruntime ") for check in named(sound, "velocity"))


def test_a_report_says_where_it_comes_from(sound: Report, pocket_bundle: Path) -> None:
    found = sound.provenance
    assert found.bundle == str(pocket_bundle)
    assert found.golden == str(POCKET / GOLDEN_FILE)
    assert [name for name, _ in found.reference] == ["torch", "diffusers", "transformers"]
    assert len(found.engines) == 5 and not found.rebuilt
    assert found.ran is not None and found.ran.startswith("onnxruntime ")
    assert "onnxruntime" in dict(found.packages)


def test_structure_runs_no_engine(pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(run.Executed, "of")
    report = validate(pocket_bundle, Options(level="structure"))
    assert report.verdict == "passed"
    assert {check.level for check in report.checks} == {"structure"}
    assert report.provenance.ran is None


@pytest.mark.parametrize("name", ["manifest.json", "transformer.onnx", "transformer.weights", "tokenizer.json"])
def test_a_damaged_file_is_a_failure_in_the_report(pocket_bundle: Path, tmp_path: Path, name: str) -> None:
    damaged = Path(shutil.copytree(pocket_bundle, tmp_path / "damaged"))
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    report = validate(damaged, Options(level="structure"))
    assert report.verdict == "failed"
    (files,) = named(report, "files")
    assert files.result == "failed" and name in files.detail


def test_a_missing_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        validate(tmp_path / "none", TRAJECTORY)


def test_without_a_golden_file_nothing_is_compared(bundle: Path) -> None:
    report = validate(bundle, TRAJECTORY)
    assert report.verdict == "incomplete"
    for name in ("golden file", "inputs", "vision", "velocity", "blocks"):
        (check,) = named(report, name)
        assert check.result == "not run"
        assert check.detail == "no golden file was named; record one with `qie golden`, and name it"
    assert validate(bundle, replace(TRAJECTORY, required=True)).verdict == "failed"


def test_a_golden_file_of_another_model_is_a_failure(bundle: Path) -> None:
    report = validate(bundle, Options(level="structure", golden=POCKET / GOLDEN_FILE))
    (check,) = named(report, "golden file")
    assert check.result == "failed"
    assert "the golden file was recorded from pocket with the digest" in check.detail


def test_a_damaged_golden_file_is_an_error(pocket_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "golden.safetensors").write_bytes((POCKET / GOLDEN_FILE).read_bytes()[:-1])
    with pytest.raises(GoldenError, match="record it again with `qie golden`"):
        validate(pocket_bundle, Options(golden=tmp_path / "golden.safetensors"))


def test_engines_for_a_gpu_are_judged_by_their_graphs(gpu_bundle: Path) -> None:
    report = validate(gpu_bundle, TRAJECTORY)
    assert report.verdict == "incomplete"
    assert [check.name for check in report.checks if check.result != "passed"] == ["engines"]
    (engines,) = named(report, "engines")
    assert engines.detail.startswith("vision is built for onnxruntime/8.9, and ")
    assert validate(gpu_bundle, replace(TRAJECTORY, backend="onnxruntime")).verdict == "passed"
    assert report.provenance.rebuilt
    assert report.provenance.ran is not None and "graphs in float32" in report.provenance.ran
    assert all("graphs in float32" in check.on for check in named(report, "velocity"))
    (graphs,) = named(report, "graphs")
    assert graphs.detail == "5 engines were built from the graphs that are run here in their place"


def test_an_engine_of_another_graph_is_found_by_its_key(gpu_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(gpu_bundle, tmp_path / "copied"))
    engines = json.loads((copied / "manifest.json").read_text())["engines"]
    changed = [engine | ({"key": "0" * 64} if engine["component"] == "language" else {}) for engine in engines]
    change_manifest(copied, engines=changed)
    report = validate(copied, TRAJECTORY)
    (graphs,) = named(report, "graphs")
    assert graphs.result == "failed"
    assert graphs.detail.startswith("language was built from another graph")


def test_a_backend_that_the_bundle_lacks(pocket_bundle: Path, gpu_bundle: Path) -> None:
    with pytest.raises(RequestError, match="has no engine of tensorrt; choose a backend"):
        validate(pocket_bundle, Options(backend="tensorrt"))
    with pytest.raises(RequestError, match="there is no backend 'openvino'; choose one of onnxruntime"):
        validate(pocket_bundle, Options(backend="openvino"))


def test_an_unknown_level(pocket_bundle: Path) -> None:
    with pytest.raises(RequestError, match="there is no level 'all'; choose one of structure, components"):
        validate(pocket_bundle, Options(level="all"))  # type: ignore[arg-type]


def test_the_checkpoint_of_other_models_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = build(checkpoint, tmp_path / "tiny-gpu", GPU).path
    report = validate(path, replace(TRAJECTORY, golden=POCKET / GOLDEN_FILE))
    (check,) = named(report, "vision")
    assert check.result == "not run"
    assert check.detail.endswith("; name the checkpoint of the bundle, whose graphs then run with onnxruntime")
    with pytest.raises(CheckpointError, match="and tiny-gpu was built from tiny with"):
        validate(path, replace(TRAJECTORY, model="pocket"))


def test_a_check_that_raises_has_failed(pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject) -> Iterator[Outcome]:
        yield Finding(value=0, detail="fine so far")
        raise ZeroDivisionError("of the check itself")

    checks = tuple(replace(spec, run=broken) if spec.name == "contract" else spec for spec in run.CHECKS)
    monkeypatch.setattr(run, "CHECKS", checks)
    found = named(validate(pocket_bundle, Options(level="structure")), "contract")
    assert [check.result for check in found] == ["passed", "failed"]
    assert found[1].detail == "it could not be computed: ZeroDivisionError: of the check itself"


def test_a_gate_of_the_recipe_decides(tmp_path: Path) -> None:
    strict = 'extends = "cpu"\n[gates.components]\nvision = 1e-9\n'
    report = validate(build("pocket", tmp_path / "strict", strict).path, Options(level="components"))
    assert {check.result for check in named(report, "vision")} == {"failed"}
    assert all(str(check.gate) == "at most 1e-09" for check in named(report, "vision"))
    assert {check.result for check in named(report, "language")} == {"passed"}


def test_gates_that_are_looser_than_the_shipped_recipes_are_told(pocket_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pocket_bundle, tmp_path / "copied"))
    recipe = json.loads((copied / "manifest.json").read_text())["recipe"]
    toml = re.sub(r"\bpsnr = [\d.]+", "psnr = 1.0", recipe["toml"])
    assert toml != recipe["toml"]
    digest = hashlib.sha256(toml.encode()).hexdigest()
    change_manifest(copied, recipe=recipe | {"toml": toml, "sha256": digest})
    report = validate(copied, Options(level="structure"))
    assert report.verdict == "passed"
    (told,) = report.provenance.looser_gates
    assert told.startswith("gates.edits.psnr is 1, in the recipe cpu that comes with qie ")
    assert validate(pocket_bundle, Options(level="structure")).provenance.looser_gates == ()
