"""``qie list``, ``qie inspect`` and ``qie rm``."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qie.engines.bundle.manifest import COMPONENTS
from tests.support.command_line import Qie


def test_list(qie: Qie, named_bundle: str, qie_home: Path) -> None:
    text = qie("list").stdout
    assert re.search(r"^mine +tiny +cpu +[\d.]+ MB +\S", text, re.MULTILINE)
    answer = json.loads(qie("list", "--json").stdout)
    assert answer["folder"] == str(qie_home / "bundles")
    (row,) = answer["bundles"]
    assert set(row) == {"name", "built", "model", "recipe", "bytes", "problem"}
    assert (row["name"], row["model"], row["recipe"], row["problem"]) == ("mine", "tiny", "cpu", None)


def test_list_without_bundles(qie: Qie, qie_home: Path) -> None:
    assert qie("list").stdout.startswith(f"no bundles in {qie_home / 'bundles'}; build one with `qie build")
    assert json.loads(qie("list", "--json").stdout)["bundles"] == []


def test_inspect(qie: Qie, bundle: Path) -> None:
    done = qie("inspect", bundle, "--verify")
    assert done.stdout.endswith("all files match their sha256\n")
    for component in COMPONENTS:
        assert re.search(rf"^{component} +onnxruntime/cpu .* yes$", done.stdout, re.MULTILINE)
    answer = json.loads(qie("inspect", bundle, "--json").stdout)
    assert set(answer) == {"path", "bytes", "verified", "engines", "manifest"}
    assert answer["verified"] is False
    assert answer["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert [engine["component"] for engine in answer["engines"]] == list(COMPONENTS)
    assert all(engine["runs_here"] and engine["reason"] is None for engine in answer["engines"])


@pytest.mark.parametrize(("answer", "deleted"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_rm_asks(named_bundle: str, qie_home: Path, answer: str, deleted: bool) -> None:
    command = [sys.executable, "-c", "from qie.compiler.cli.main import main; main()", "rm", named_bundle]
    done = subprocess.run(command, input=answer, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"delete {qie_home.resolve() / 'bundles' / named_bundle}?")
    assert (qie_home / "bundles" / named_bundle).exists() != deleted


def test_rm_yes_does_not_ask(qie: Qie, named_bundle: str, qie_home: Path) -> None:
    done = qie("rm", named_bundle, "--yes")
    assert done.stdout == f"deleted {qie_home.resolve() / 'bundles' / named_bundle}\n"
    assert list((qie_home / "bundles").iterdir()) == []


def test_rm_of_the_folder_that_one_is_in(
    qie: Qie, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert qie("rm", ".", "--yes").returncode == 0
    assert not (tmp_path / "here").exists()


def test_a_question_does_not_control_the_terminal(
    qie: Qie, bundle: Path, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "\x1b[31mred\u202e")
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda question: asked.append(question))
    assert qie("rm", "\x1b[31mred\u202e").returncode == 0
    assert asked[0].endswith("\\x1b[31mred\\u202e?")
