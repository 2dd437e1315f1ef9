"""The tree of errors."""

import importlib
import inspect
import pickle
import re
from typing import NamedTuple

import pytest

from qie.compiler.cli.main import main
from qie.engines import errors
from tests.support.repository import MODULES

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.QieError)]


class DrawnError(NamedTuple):
    """A line of the drawing in the docstring of errors.py."""

    parent: str
    meaning: str
    exit_code: int
    http_status: int


def drawn_errors(drawing: str) -> dict[str, DrawnError]:
    """The drawn tree by name; every level is indented by four characters."""
    drawn: dict[str, DrawnError] = {}
    above: list[str] = []
    pattern = re.compile(r"^ {4}([ │├└─]*)(\w+Error) +(.+?) +\((\d+), (\d+)\)$", re.MULTILINE)
    for branch, name, meaning, code, status in pattern.findall(drawing):
        depth, rest = divmod(len(branch), 4)
        assert rest == 0, name
        above[depth:] = [name]
        drawn[name] = DrawnError(above[depth - 1] if depth else "Exception", meaning, int(code), int(status))
    return drawn


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn = drawn_errors(str(errors.__doc__))
    assert {name: error.parent for name, error in drawn.items()} == {
        error.__name__: error.__base__.__name__ for error in ERRORS if error.__base__
    }
    assert list(drawn) == [error.__name__ for error in ERRORS]
    assert sorted(drawn) == [name for name in errors.__all__ if name.endswith("Error")]


def test_the_drawn_exit_codes_and_http_statuses_are_the_real_ones() -> None:
    drawn = drawn_errors(str(errors.__doc__))
    assert {name: error.exit_code for name, error in drawn.items()} == {e.__name__: e.exit_code for e in ERRORS}
    assert {name: error.http_status for name, error in drawn.items()} == {e.__name__: e.http_status for e in ERRORS}
    assert {name for name, error in drawn.items() if error.http_status == 400} == {"RequestError", "ImageError"}


@pytest.mark.parametrize("error", ERRORS[1:], ids=lambda error: error.__name__)
def test_the_drawn_meaning_of_an_error_begins_as_its_docstring(error: type[errors.QieError]) -> None:
    summary = str(inspect.getdoc(error)).rstrip(".").lower()
    assert drawn_errors(str(errors.__doc__))[error.__name__].meaning.lower().startswith(summary)


def test_an_error_names_the_option_that_a_caller_may_change() -> None:
    assert errors.BuildError("found this; do that").option is None
    problem = errors.RequestError("found this; do that", option="size")
    assert (str(problem), problem.option) == ("found this; do that", "size")
    assert pickle.loads(pickle.dumps(problem)).option == "size"


def test_the_tree_has_no_branch_elsewhere() -> None:
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, errors.QieError):
                assert value in ERRORS, f"{name}.{value.__name__}"


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_the_command_line_ends_with_the_exit_code_of_an_error(
    error: type[errors.QieError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error("found this; do that")

    monkeypatch.setattr("qie.compiler.cli.app.app", fail)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == error.exit_code == 2
    assert capsys.readouterr() == ("", "error: found this; do that\n")
