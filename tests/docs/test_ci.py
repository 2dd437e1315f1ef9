"""The CI examples: their schemas, what they allow, and that their commands run as they are written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.support.repository import ROOT

GITHUB = ROOT / ".github" / "workflows" / "engine-validation.yml"
VLLM = ROOT / ".github" / "workflows" / "vllm.yml"
GITLAB = ROOT / "docs" / "ci" / "gitlab-engine-validation.yml"

EXPRESSIONS = {
    "inputs.model || 'pocket'": "pocket",
    "inputs.golden": "",
    "inputs.calibration": "",
}
"""The values of expressions on a push, without inputs."""

QIE = """#!/bin/sh
exec {python} -c 'from qie.compiler.cli.main import main; main()' "$@"
"""


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(GITHUB.read_text(encoding="utf-8"))
    return loaded


def gitlab() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(GITLAB.read_text(encoding="utf-8"))
    return loaded


def check_schema(schema: str, path: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-workflows", GITHUB),
        ("custom.github-workflows-require-timeout", GITHUB),
        ("vendor.github-workflows", VLLM),
        ("custom.github-workflows-require-timeout", VLLM),
        ("vendor.gitlab-ci", GITLAB),
    ],
)
def test_the_schemas_allow_them(schema: str, path: Path) -> None:
    done = check_schema(schema, path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("vendor.github-workflows", "on: push\njobs: {one: {runs-on: x, steps: [{run: a, uses: b}], needs: {}}}"),
        ("vendor.gitlab-ci", "one: {script: a, parallel: {matrix: 3}}"),
    ],
)
def test_the_schemas_find_faults(schema: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yml").write_text(text)
    assert check_schema(schema, tmp_path / "file.yml").returncode == 1


def test_a_workflow_may_read_and_nothing_else() -> None:
    text = workflow()
    assert text["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in text["jobs"].values())


def test_only_a_newer_commit_of_a_pull_request_cancels() -> None:
    found = workflow()["concurrency"]
    assert found["cancel-in-progress"] is True
    assert found["group"].endswith("-${{ github.event.pull_request.number || github.run_id }}")


def test_actions_are_those_of_github_at_a_major_version() -> None:
    used = [step["uses"] for job in workflow()["jobs"].values() for step in job["steps"] if "uses" in step]
    assert len(used) >= 7
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_no_command_contains_an_expression() -> None:
    """What a person enters is a variable, and so cannot become a command."""
    for job in workflow()["jobs"].values():
        for step in job["steps"]:
            assert "${{" not in step.get("run", "")


def qie_commands(scripts: list[str]) -> list[str]:
    """The commands of qie, each in one line."""
    joined = "\n".join(scripts).replace("\\\n", " ")
    found = re.findall(r"\bqie (?:build|validate) [^\n;]*", joined)
    return [" ".join(command.split()) for command in found]


def test_gitlab_runs_the_commands_of_github() -> None:
    for ours, theirs in (("without-gpu", "engine-validation"), ("on-gpu", ".engine-validation-on-gpu")):
        steps = [step["run"] for step in workflow()["jobs"][ours]["steps"] if "run" in step]
        commands = qie_commands(steps)
        assert len(commands) >= 2
        assert commands == qie_commands(gitlab()[theirs]["script"])


def test_both_build_for_the_same_gpus() -> None:
    jobs = workflow()["jobs"]
    assert jobs["without-gpu"]["strategy"]["matrix"]["gpu"] == ["l40s", "a100"]
    assert gitlab()["engine-validation"]["parallel"]["matrix"] == [{"GPU": ["l40s", "a100"]}]
    for row in jobs["on-gpu"]["strategy"]["matrix"]["include"]:
        job = gitlab()[f"engine-validation-on-{row['gpu']}"]
        assert job["extends"] == ".engine-validation-on-gpu"
        assert job["variables"] == {"GPU": row["gpu"], "EXTRA": row["extra"]}
        assert job["tags"] == [row["gpu"]]


def test_a_gpu_waits_for_its_own_bundle_alone() -> None:
    """A failed job of one GPU leaves the other's on."""
    assert workflow()["jobs"]["on-gpu"]["if"] == "${{ inputs.gpu && !cancelled() }}"
    for gpu in ("l40s", "a100"):
        needed = gitlab()[f"engine-validation-on-{gpu}"]["needs"]
        assert needed == [{"job": "engine-validation", "parallel": {"matrix": [{"GPU": gpu}]}}]


def commands() -> list[str]:
    """Every command of both files."""
    found = [step["run"] for job in workflow()["jobs"].values() for step in job["steps"] if "run" in step]
    jobs = [job for job in gitlab().values() if isinstance(job, dict)]
    return found + [line for job in jobs for key in ("before_script", "script") for line in job.get(key, ())]


def syntax(command: str) -> str:
    """What bash finds wrong in a command; empty for nothing."""
    return subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False).stderr


def test_bash_understands_every_command() -> None:
    assert len(commands()) >= 14
    assert [found for command in commands() if (found := syntax(command))] == []
    assert "unexpected" in syntax("if true; then echo")


def evaluated(text: str, gpu: str) -> str:
    """``text`` with the values of its expressions; one that is not known is an error."""
    values = EXPRESSIONS | {"matrix.gpu": gpu}
    return re.sub(r"\$\{\{\s*(.*?)\s*\}\}", lambda found: values[found[1]], str(text))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["l40s", pytest.param("a100", marks=pytest.mark.soak)])
def test_the_job_without_a_gpu_runs(gpu: str, tmp_path: Path) -> None:
    """Every command but the installation, in order, as GitHub runs them."""
    text = workflow()
    job = text["jobs"]["without-gpu"]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "qie").write_text(QIE.format(python=sys.executable))
    (programs / "qie").chmod(0o755)
    place = tmp_path / "checkout"
    place.mkdir()
    summary = tmp_path / "summary.md"
    variables = {name: evaluated(value, gpu) for name, value in {**text["env"], **job["env"]}.items()}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **variables, "PATH": path, "GITHUB_STEP_SUMMARY": str(summary)}
    steps = [step for step in job["steps"] if "run" in step]
    assert steps[0]["name"] == "Install qie"
    for step in steps[1:]:
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step['name']}\n{done.stdout}\n{done.stderr}"
    for name in ("structure", "graphs"):
        report = json.loads((place / "reports" / f"{name}.json").read_text(encoding="utf-8"))
        assert report["counts"]["failed"] == 0
        assert report["counts"]["passed"] > 0
        suites = ElementTree.parse(place / "reports" / f"{name}.xml").getroot()
        assert suites.attrib["failures"] == "0"
        assert int(suites.attrib["tests"]) == len(report["checks"])
        assert (place / "reports" / f"{name}.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        assert (place / "reports" / f"{name}.md").read_text(encoding="utf-8") in summary.read_text(encoding="utf-8")
    assert {check["level"] for check in report["checks"]} >= {"structure", "components", "trajectory"}
    assert sorted(p.name.partition(".")[0] for p in (place / "reports").iterdir()) == ["graphs"] * 4 + ["structure"] * 4
