"""The words of the project: no replaced word in code, documents or recipes (CONTRIBUTING.md has the table)."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

CODE = sorted(path for room in ("compiler", "engines", "pocket", "bench") for path in (ROOT / room).rglob("*.py"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.md")),
]

REPLACED = {
    word: re.compile(pattern, re.IGNORECASE)
    for word, pattern in {
        "card": r"\bcards?\b",
        "processor": r"\bprocessors?\b",
        "picture": r"\bpictures?\b",
        "photograph": r"\bphotographs?\b",
        "mend": r"\bmend(s|ed|ing)?\b",
        "is said": r"\b(is|are|was|were) said\b",
        "of qie's": r"\bof qie's\b",
    }.items()
}

ALLOWED = re.compile(
    r"model cards?"
    r"|image processors?|transformers' processor|processor/|^ *processor:"  # of transformers, and fields named after it
    r"|(?-i:Picture (\d|\{))"  # the template of Edit-Plus
    r'|"[^"\n]*"'  # a quoted instruction
    r"|^\| GPU, CPU, image \|.*"  # the table of words itself
    r"|licenses of the photographs|^The photographs in|\*\*Photographs\*\* that come with",  # sources and licenses
    re.MULTILINE | re.IGNORECASE,
)
"""Text in which a replaced word is right."""


ALLOWED_FILES = {
    "compiler/checkpoint/processor.py": {"processor"},  # reads the config of the image processor
    "compiler/validation/reference.py": {"processor"},  # loads transformers' Qwen2VLProcessor
    "pocket/cases.py": {"picture"},  # one of them
    "pocket/data/edits.py": {"picture"},  # the instructions of the pocket model
}


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment, docstring and other string of several words in Python source."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Line and words of every name that Python source defines or reads, except those of transformers' processor."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], re.sub("processor", "", token.string.replace("_", " "), flags=re.IGNORECASE)


def replaced_words(text: str) -> set[str]:
    """The replaced words in ``text``, except where they are right."""
    rest = ALLOWED.sub("", text)
    return {word for word, pattern in REPLACED.items() if pattern.search(rest)}


@pytest.mark.parametrize("path", [*CODE, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    if path.suffix == ".py":
        passages = [*prose(text), *identifiers(text)]
    else:
        passages = list(enumerate(text.splitlines(), start=1))
    words = {(line, *sorted(replaced_words(passage) - ALLOWED_FILES.get(name, set()))) for line, passage in passages}
    assert sorted(entry for entry in words if len(entry) > 1) == []


def test_an_allowed_file_needs_to_be_allowed() -> None:
    """An entry goes when the file no longer uses the word."""
    for name, words in ALLOWED_FILES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert {word for _, passage in prose(text) for word in replaced_words(passage)} >= words, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the bundle for this card", {"card"}),
        ("near the processor's result", {"processor"}),
        ("two pictures of a cat", {"picture"}),
        ("616 edits of held-out photographs", {"photograph"}),
        ("mend the file, as is said above", {"mend", "is said"}),
        ("a file of qie's", {"of qie's"}),
        ("the default of the model card, in the order of the image processor", set()),
        ('qie run jacket.jpg "put on the jacket of picture 2"', set()),
        ("the jacket of picture 2", {"picture"}),
        ("Sources and licenses of the photographs: [docs/images/README.md]", set()),
        ("Picture 1: <|vision_start|>, recommended, discard, processor/vocab.json", set()),
    ],
)
def test_the_rules_find_what_they_should(text: str, words: set[str]) -> None:
    assert replaced_words(text) == words
