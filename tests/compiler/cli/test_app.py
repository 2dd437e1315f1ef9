"""Help, version, and what every command has in common: sections, examples, widths, flags in errors."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

import qie as package
from qie.compiler.cli.app import SECTIONS, app
from qie.compiler.cli.main import main
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.quantizable import QUANTIZABLE, SchemeName
from qie.engines.errors import RequestError
from tests.support.command_line import Qie, Refusal

GROUP: Any = typer.main.get_command(app)
COMMANDS = [name for names in SECTIONS.values() for name in names]


def epilogs() -> Iterator[str]:
    for command in (GROUP, *GROUP.commands.values(), *GROUP.commands["recipes"].commands.values()):
        assert command.epilog, command.name
        yield from re.findall(r"^  (qie .*)$", command.epilog, re.MULTILINE)


def test_help_has_every_command_in_one_section(qie: Qie) -> None:
    assert sorted(COMMANDS) == sorted(GROUP.commands)
    text = qie("--help").stdout
    for title, names in SECTIONS.items():
        section = text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  ([a-z-]+)  ", section, re.MULTILINE) == list(names)


@pytest.mark.parametrize("columns", [80, 100])
def test_a_summary_is_one_whole_sentence(qie: Qie, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    summaries = dict(re.findall(r"^  ([a-z-]+) +([A-Z].*)$", qie("--help").stdout, re.MULTILINE))
    assert set(summaries) >= set(COMMANDS)
    for summary in (summaries[command] for command in COMMANDS):
        assert len(summary) <= 50, summary
        assert re.fullmatch(r"[^.…]+\.", summary), summary


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(qie: Qie, command: str) -> None:
    done = qie(command, "--help")
    assert done.returncode == 0
    assert f"qie {command}" in done.stdout
    assert "[[" not in done.stdout
    assert "{schemes}" not in done.stdout
    assert re.search(r"Examples:\n +qie ", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize("example", sorted(set(epilogs())))
def test_an_example_can_be_parsed(example: str) -> None:
    """Every option exists, and every value is of its kind; nothing runs."""
    _, name, *words = shlex.split(example.partition(" > ")[0])
    command = GROUP.commands[name]
    if words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(name, words)


@pytest.mark.parametrize(
    "command", ["add-schedule", "build", "calibrate", "export", "golden", "inspect", "plan", "rm", "run"]
)
def test_without_arguments_there_is_help(qie: Qie, command: str, qie_home: Path) -> None:
    done = qie(command)
    assert f"Usage: qie {command}" in done.stdout + done.stderr
    assert list(qie_home.iterdir()) == []


def test_a_build_for_a_gpu_is_of_the_published_model(qie: Qie, refusal: Refusal) -> None:
    """The tests are offline."""
    assert "Qwen/Qwen-Image-Edit-2511 is not complete in the cache" in refusal(qie("build", "--gpu", "l40s"))


def test_choices_are_those_of_the_registries(qie: Qie) -> None:
    text = " ".join(qie("calibrate", "--help").stdout.split())
    assert f"Scheme to rank for: {', '.join(SCHEMES)};" in text
    assert f"Component to rank: {' or '.join(QUANTIZABLE)}." in text
    assert set(get_args(SchemeName)) == {"none", *SCHEMES}


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(
    "words", [("doctor",), ("recipes",), ("list",), ("plan", "pocket", "--gpu", "l40s"), ("inspect", "mine"),
              ("build", "pocket", "--gpu", "l40s", "--dry-run")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_tables_fit_the_terminal(
    qie: Qie, named_bundle: str, words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but paths and commands, which are not broken."""
    monkeypatch.setenv("COLUMNS", str(columns))
    done = qie(*words)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert len(line) <= columns or "/" in line or "fix: " in line, line


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("command", "option", "flag"),
    [("run", "guidance", "--cfg"), ("run", "seeds", "--seed"), ("run", "size", "--size"), ("build", "loras", "--lora"),
     ("build", "out", "--out"), ("inspect", "size", None), ("run", None, None), ("nonsense", "size", None)],
)  # fmt: skip
def test_an_error_names_the_flag_of_its_option(
    command: str,
    option: str | None,
    flag: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing:
        def __call__(self) -> None:
            raise RequestError("this was found; do that", option=option)

        def __getattr__(self, name: str) -> Any:
            return getattr(app, name)

    monkeypatch.setattr("sys.argv", ["qie", command])
    monkeypatch.setattr("qie.compiler.cli.app.app", Failing())
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"error: this was found; do that{f' ({flag})' if flag else ''}\n"


def test_version(qie: Qie) -> None:
    assert qie("--version").stdout == f"qie {package.__version__}\n"
