"""What git holds: short files, no path of one machine, no conflict markers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.repository import ROOT, SOURCES

LINES_MAX = 400
PYTHON_FILES = sorted(
    path for folder in ("compiler", "engines", "pocket", "tests", "bench") for path in (ROOT / folder).rglob("*.py")
)
MACHINE_PATH = re.compile(rb"(?<![\w.$~})>/-])/(?:home|root|work|Users)/")
CONFLICT_MARKER = re.compile(rb"^(?:<{7} |\|{7} |={7}\r?$|>{7} )", re.MULTILINE)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES_MAX


def git(*words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run git in the repository; skips where there is no git or no repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git repository, or git is not installed")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False)


def versioned() -> dict[str, bytes]:
    """The content of every file under git by its path; links are left out."""
    listed = git("ls-files", "-z")
    assert listed.returncode == 0, listed.stderr
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in paths if p.is_file() and not p.is_symlink()}


def lines_with(pattern: re.Pattern[bytes]) -> list[str]:
    """The places under git where ``pattern`` is found, as file:line."""
    return [
        f"{name}:{number}"
        for name, content in versioned().items()
        for number, line in enumerate(content.split(b"\n"), start=1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_one_machine() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_no_file_has_a_conflict_marker() -> None:
    assert lines_with(CONFLICT_MARKER) == []


@pytest.mark.parametrize("name", ["home", "root", "work", "Users"])
def test_the_pattern_of_machine_paths_finds_them(name: str) -> None:
    for text in (f"/{name}/me", f'"/{name}/me"', f"={'/'}{name}/x", f"file: /{name}/x"):
        assert MACHINE_PATH.search(text.encode()), text
    for text in (f"https://example.org/{name}/x", f"../{name}/x", f"docs/{name}/x", f"$HOME/{name}/", f"{{x}}/{name}/"):
        assert not MACHINE_PATH.search(text.encode()), text


@pytest.mark.parametrize("mark", "<|=>")
def test_the_pattern_of_conflict_markers_finds_them(mark: str) -> None:
    marker = 7 * mark + ("" if mark == "=" else " theirs")
    assert CONFLICT_MARKER.search(f"before\n{marker}\nafter".encode())
    assert not CONFLICT_MARKER.search(f"before\n {marker}\nafter".encode())
    assert not CONFLICT_MARKER.search(f"before\n{mark}{marker}\nafter".encode())


def test_git_ignores_no_source() -> None:
    names = [str(path.relative_to(ROOT)) for path in SOURCES]
    ignored = git("check-ignore", "--no-index", "--stdin", lines="\n".join(names))
    assert ignored.stdout.splitlines() == []
    assert ignored.returncode == 1, ignored.stderr
