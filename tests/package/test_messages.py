"""The messages of errors: one sentence, what was found, a semicolon, the fix; only the command line names flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

SOURCES = sorted(path for room in ("compiler", "engines") for path in (ROOT / room).rglob("*.py"))
ERRORS = re.compile(
    r"(Recipe|Checkpoint|Calibration|Golden|Export|Build|Bundle|EngineMismatch|BackendMissing|Request|Image|Engine)Error"
)
MESSAGES = re.compile(r"unavailable|_(.*_)?(refusal|obstacle|out_of_memory|sentence|choices)")
"""Functions whose text becomes the message of an error."""
COMMAND = re.compile(r"`[^`]*`")


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every message that is a literal; an inserted value reads ``{}``.

    A message is the argument of an error, what a function of ``MESSAGES`` returns, and what one yields behind the name
    of a key.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[message]) if ERRORS.fullmatch(name):
                yield from literals(message)
            case ast.FunctionDef(name=name) if MESSAGES.fullmatch(name):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from literals(inner.value)
            case ast.Yield(value=ast.Tuple(elts=[_, message])):
                yield from literals(message)


def literals(message: ast.expr) -> Iterator[tuple[int, str]]:
    """Line and text of ``message`` where it is a string."""
    match message:
        case ast.Constant(value=str(text)):
            yield message.lineno, text
        case ast.JoinedStr(values=values):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in values)
            yield message.lineno, "".join(map(str, parts))


def faults(message: str) -> list[str]:
    """What is wrong with a message; one that ends in another's sentence has its semicolon there."""
    outside = COMMAND.sub("``", message)
    checks = {
        "has exactly one semicolon": outside.count(";") == (0 if outside.endswith("{}") and ";" not in outside else 1),
        "has no full stop": not message.endswith("."),
        "starts in lower case": not message[:1].isupper() or message.startswith(("CUDA ", "TensorRT ")),
        "names no flag": not re.search(r"(^|[\s(])--\w", outside),
    }
    return [rule for rule, kept in checks.items() if not kept]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages(path: Path) -> None:
    checked = {line: (message, faults(message)) for line, message in messages(path.read_text(encoding="utf-8"))}
    allowed = {"names no flag"} if path.parent.name == "cli" else set()
    assert not {line: (message, wrong) for line, (message, wrong) in checked.items() if set(wrong) - allowed}


def test_messages_are_found_where_they_are_made() -> None:
    source = """
def unavailable(recipe): return f"{recipe} is old; take another"
def _gpu_refusal(): return "it is large; take less"
def title(): return "a title"
def rules(): yield "key", "is 3; lower it"
raise BuildError("found; fix", option="out")
"""
    texts = {text for _, text in messages(source)}
    assert texts == {"{} is old; take another", "it is large; take less", "is 3; lower it", "found; fix"}


def test_there_are_messages() -> None:
    assert sum(len(list(messages(path.read_text(encoding="utf-8")))) for path in SOURCES) > 180


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("{} has 3 channels, expected 1; convert it to grayscale", []),
        ("{} is not built; run `qie build --gpu {}`", []),
        (
            "The seed {} cannot be used: give another.",
            ["has exactly one semicolon", "has no full stop", "starts in lower"],
        ),
        ("the size is {}; use a smaller --size", ["names no flag"]),
        ("a; b; c", ["has exactly one semicolon"]),
    ],
)
def test_the_rules_find_what_they_should(message: str, wrong: list[str]) -> None:
    assert len(faults(message)) == len(wrong)
    assert all(rule.startswith(start) for rule, start in zip(faults(message), wrong, strict=True))
