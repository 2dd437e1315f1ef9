"""``qie validate``: exit codes, files, the summary of a step, and what is refused before anything runs."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.command_line import Qie, Refusal
from tests.support.damage import flip


def test_a_sound_bundle_exits_with_0(qie: Qie, pocket_bundle: Path) -> None:
    done = qie("validate", pocket_bundle, "--level", "trajectory")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].endswith(" passed, 0 failed, 0 not run: passed")


def test_a_damaged_bundle_exits_with_1_and_says_what(qie: Qie, pocket_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pocket_bundle, tmp_path / "copied"))
    flip(copied / "vae_decoder.weights")
    done = qie("validate", copied, "--level", "structure")
    assert done.returncode == 1
    assert "vae_decoder.weights is damaged; build the bundle again" in " ".join(done.stdout.split())
    assert done.stderr == ""


def test_all_files_are_written(qie: Qie, pocket_bundle: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"report.{kind}" for kind in ("junit", "json", "html", "markdown")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    assert qie("validate", pocket_bundle, "--level", "structure", *options).returncode == 0
    assert json.loads(files["json"].read_text())["verdict"] == "passed"
    assert ElementTree.parse(files["junit"]).getroot().get("failures") == "0"
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["markdown"].read_text().startswith("## qie validate pocket-cpu, up to level structure: passed")


def test_the_summary_of_a_step_is_added_to(
    qie: Qie, pocket_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("of another command\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert qie("validate", pocket_bundle, "--level", "structure").returncode == 0
    assert summary.read_text().startswith(
        "of another command\n## qie validate pocket-cpu, up to level structure: passed"
    )


def test_what_is_required_and_did_not_run_exits_with_1(qie: Qie, edit_bundle: Path) -> None:
    assert qie("validate", edit_bundle, "--level", "components").returncode == 0
    done = qie("validate", edit_bundle, "--level", "components", "--require")
    assert done.returncode == 1
    assert re.search(r"[1-9] not run: failed$", done.stdout)


@pytest.mark.slow
def test_lpips_without_its_package_is_not_run(qie: Qie, pocket_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert qie("validate", pocket_bundle, "--require", "--json", report).returncode == 1
    content = json.loads(report.read_text())
    assert (content["verdict"], content["counts"]["failed"]) == ("failed", 0)
    assert {check["name"] for check in content["checks"] if check["result"] == "not run"} == {"lpips"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--level", "all"], "there is no level 'all'; choose one of structure, components, trajectory, edits"),
        (
            ["--backend", "openvino"],
            "there is no backend 'openvino'; choose one of onnxruntime, tensorrt-rtx, tensorrt,",
        ),
        (["--html", "none/report.html"], "none/report.html cannot be written; choose a file in an existing folder"),
        (["--golden", "none.safetensors"], "the golden file none.safetensors cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(
    qie: Qie, refusal: Refusal, pocket_bundle: Path, workplace: Path, words: list[str], message: str
) -> None:
    assert refusal(qie("validate", pocket_bundle, *words)).startswith(message)


def test_a_missing_bundle_is_refused(qie: Qie, refusal: Refusal) -> None:
    assert refusal(qie("validate", "none")).startswith("there is no bundle 'none'")
