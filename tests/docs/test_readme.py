"""What the documents say works: commands parse, links and paths lead somewhere, examples run, output is current."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qie.compiler.cli.app import app
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS
from tests.support.repository import ROOT

DOCUMENTS = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*.md")))
PYTHON_FILES = [path for room in ("compiler", "engines", "tests") for path in (ROOT / room).rglob("*.py")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:^ {4}|`)(qie [^`#\n…]*[^`#\n… ])", README, re.MULTILINE)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def missing_paths(text: str) -> list[str]:
    """The paths in backticks that are not in the repository; NAME stands for any name, a bare file may lie anywhere."""
    paths = re.findall(r"`([\w.*-]+(?:/[\w.*-]*)*)`", text)
    inside = [path for path in paths if "/" in path and (ROOT / path.partition("/")[0]).is_dir()]
    anywhere = [path for path in paths if "/" not in path and path.endswith(".py")]
    patterns = {path: path.rstrip("/").replace("NAME", "*") for path in inside}
    return [path for path, pattern in patterns.items() if not any(ROOT.glob(pattern))] + [
        name for name in anywhere if not any(path.name == name for path in PYTHON_FILES)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    assert missing_paths(document.read_text(encoding="utf-8")) == []


def test_a_missing_path_is_found() -> None:
    text = "`compiler/NAME.py`, `engines/none.py`, `docs/`, `docs/none/`, `cli.py`, `choose.py`, `amax/x`, `a.json`"
    assert missing_paths(text) == ["engines/none.py", "docs/none/", "cli.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_these_options(command: str) -> None:
    """Every command line of the README names a command of qie and options that it has."""
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    while words and hasattr(group, "commands") and words[0] in group.commands:
        group = group.commands[words.pop(0)]
    assert group.name != app.info.name, f"no command in {command!r}"
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known | {"--help"}


def test_readme_names_every_command() -> None:
    named = {shlex.split(command)[1] for command in COMMANDS}
    assert set(typer.main.get_command(app).commands) <= named


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^ {4}make ([a-z-]+)", README, re.MULTILINE))))
def test_make_targets_exist(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed; run `apt-get install make`")
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_demo_prints_this_plan(qie_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output that the README shows begins with what the same build plans."""
    monkeypatch.setenv("COLUMNS", "120")
    command, shown = re.findall(r"^ {4}\.venv/bin/qie (build .*)\n((?: {4}.*\n|\n)+)", README, re.MULTILINE)[0]
    done = CliRunner().invoke(app, [*shlex.split(command), "--dry-run"])
    assert done.exit_code == 0, done.output
    plan = done.output.replace(str(qie_home), "…/out/home")
    assert re.sub("^ {4}", "", shown, flags=re.MULTILINE).startswith(plan)


@pytest.mark.parametrize("document", ["README.md", pytest.param("docs/python.md", marks=pytest.mark.slow)])
def test_python_examples_run(document: str, bundle: Path, qie_home: Path, tmp_path: Path) -> None:
    """The blocks of a page run in order, in a folder with the images of the repository."""
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    shutil.copytree(bundle, qie_home / "bundles" / "pocket-cpu")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    (tmp_path / "example.py").write_text("\n".join(examples), encoding="utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("component", COMPONENTS)
def test_polygraphy_reads_what_export_writes(component: str, bfloat16_graphs: Path) -> None:
    """The commands of docs/tensorrt.md that need no GPU, for every graph."""
    text = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    layers, parser = re.findall(
        r"^ {4}((?:\w+=\d )?polygraphy inspect .* )graphs/transformer\.onnx(.*)$", text, re.MULTILINE
    )
    for (command, options), said in ((layers, f"Name: {component}"), (parser, "fully supported by TensorRT")):
        line = f"{command}{bfloat16_graphs / component}.onnx{options}"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=bfloat16_graphs, env=environment())
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def environment() -> dict[str, str]:
    """Programs that lie beside the interpreter are found."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def bfloat16_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint = write_checkpoint(folder / "tiny", ARCHITECTURES["tiny"])
    done = CliRunner().invoke(app, ["export", str(checkpoint), "--gpu", "a100", "--out", str(folder / "graphs")])
    assert done.exit_code == 0, done.output
    return folder / "graphs"
