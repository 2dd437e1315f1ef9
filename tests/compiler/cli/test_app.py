"""Help and version."""

import re

import pytest

import qie as package
from tests.support.command_line import Qie


def test_help_names_every_command(qie: Qie) -> None:
    done = qie("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)
    assert set(listed) >= {"build", "doctor", "export", "inspect", "list", "recipes", "rm", "run"}


@pytest.mark.parametrize("command", ["build", "doctor", "export", "inspect", "list", "recipes", "rm", "run"])
def test_every_command_has_help(qie: Qie, command: str) -> None:
    done = qie(command, "--help")
    assert done.returncode == 0
    assert f"qie {command}" in done.stdout
    assert done.stderr == ""


def test_version(qie: Qie) -> None:
    assert qie("--version").stdout == f"qie {package.__version__}\n"
