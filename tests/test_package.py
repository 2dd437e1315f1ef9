"""The package as a whole: links, wheel and sdist, public names, imports, the tree of errors, and what git holds."""

import ast
import configparser
import email
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qie.compiler.cli import app as cli
from qie.engines import errors

ROOT = Path(__file__).parent.parent
FOLDERS = ("compiler", "engines", "recipes")
SOURCES = sorted(path for folder in ("compiler", "engines") for path in (ROOT / folder).rglob("*.py"))
MODULES = [
    ".".join(("qie", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for path in SOURCES
]
ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.QieError)]

DEPENDENCIES = {"numpy", "onnxruntime", "pillow", "tokenizers", "typer"}
EXTRAS = {"compile", "cuda", "dev", "reference", "rtx", "serve", "tensorrt", "trtllm"}
NOT_IN_ENGINES = (
    "diffusers", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy", "rich",
    "safetensors", "torch", "torchvision", "transformers",
)  # fmt: skip
NOT_IN_COMPILER = ("accelerate", "diffusers", "rich", "torch", "torchvision", "transformers")
MOST_LINES = 400

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""
"""Builds the distribution of the folder that it runs in: what pip calls, without pip."""

IMPORT = """
import importlib, sys
blocked, modules = (words.split(",") for words in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))
failed = False
for module in modules:
    for name in [name for name in sys.modules if name.split(".")[0] == "qie"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except ImportError as problem:
        failed = True
        print(f"{module}: {problem}")
sys.exit(failed)
"""
"""Imports each module as the first one of qie, with None in the place of every blocked package."""

MACHINE_PATH = re.compile(rb"(?<![\w.$~})>/-])/(?:home|root|work|Users)/")
CONFLICT_MARKER = re.compile(rb"^(?:<{7} |\|{7} |={7}\r?$|>{7} )", re.MULTILINE)


class Distributions(NamedTuple):
    """What was built, file by file: name to content. The sdist's names are without its leading folder."""

    wheel: dict[str, bytes]
    sdist: dict[str, bytes]
    wheel_of_sdist: dict[str, bytes]


# Links


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_leads_to_the_folder_of_its_name_wherever_the_repository_lies(name: str) -> None:
    link = ROOT / "src" / "qie" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", "..", name)
    assert link.resolve() == (ROOT / name).resolve()
    assert link.is_dir()


def test_the_import_root_holds_nothing_else() -> None:
    names = {path.name for path in (ROOT / "src" / "qie").iterdir()} - {"__pycache__"}
    assert names == {"__init__.py", "py.typed", *FOLDERS}


# Wheel and sdist


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Wheel and sdist of a copy of the tree in which tests, a benchmark and weights lie about."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, so nothing can be built offline; run `pip install 'setuptools>=77'`")
    folder = tmp_path_factory.mktemp("distributions")
    tree = copy_tree(folder / "tree")
    for decoy in ("tests/test_decoy.py", "bench/decoy.py", "recipes/decoy.safetensors", "compiler/decoy.onnx"):
        (tree / decoy).write_bytes(b"0")
    sdist = build("sdist", tree, folder / "sdist")
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        if hasattr(tarfile, "data_filter"):  # since 3.11.4
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Distributions(
        wheel=read_wheel(build("wheel", tree, folder / "wheel")),
        sdist={str(path.relative_to(unpacked)): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()},
        wheel_of_sdist=read_wheel(build("wheel", unpacked, folder / "wheel_of_sdist")),
    )


def copy_tree(destination: Path) -> Path:
    """Copy what the repository's folders and files of packaging hold, links as links, without what tools leave."""
    destination.mkdir()
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, destination)
    for name in ("src", "tests", *FOLDERS):
        leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
        shutil.copytree(ROOT / name, destination / name, symlinks=True, ignore=leave_out)
    (destination / "bench").mkdir()
    return destination


def build(kind: str, tree: Path, destination: Path) -> Path:
    """Build the wheel or the sdist of ``tree`` in a process of its own, and return the file."""
    destination.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(destination)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = destination.iterdir()
    return file


def read_wheel(path: Path) -> dict[str, bytes]:
    """Return the content of every file of a wheel by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packaged() -> dict[str, bytes]:
    """Return what must be installed, by its name below the import root's parent."""
    recipes = [*(ROOT / "recipes").glob("*.toml"), ROOT / "recipes" / "README.md"]
    recipes += [path for path in (ROOT / "recipes" / "pocket").rglob("*") if path.is_file()]
    files = {f"qie/{path.relative_to(ROOT)}": path.read_bytes() for path in [*SOURCES, *recipes]}
    return files | {f"qie/{name}": (ROOT / "src" / "qie" / name).read_bytes() for name in ("__init__.py", "py.typed")}


def dist_info(wheel: dict[str, bytes], name: str) -> str:
    """Return a file of the wheel's metadata."""
    (found,) = (content for path, content in wheel.items() if re.fullmatch(rf"qie-[^/]+\.dist-info/{name}", path))
    return found.decode()


def metadata(distributions: Distributions) -> Message:
    """Return the wheel's METADATA."""
    return email.message_from_string(dist_info(distributions.wheel, "METADATA"))


def test_the_wheel_holds_sources_and_recipes_and_nothing_else(distributions: Distributions) -> None:
    held = {name: content for name, content in distributions.wheel.items() if ".dist-info/" not in name}
    assert sorted(held) == sorted(packaged())
    assert held == packaged()


def test_the_wheel_is_small(distributions: Distributions) -> None:
    """Weights of the pocket model included, which are 24 MB at the most."""
    weights = [content for name, content in distributions.wheel.items() if name.endswith(".safetensors")]
    assert 20e6 < sum(map(len, weights)) < 24e6
    assert sum(map(len, distributions.wheel.values())) < 32e6


def test_the_sdist_holds_the_same_and_what_a_build_reads(distributions: Distributions) -> None:
    held = {name: content for name, content in distributions.sdist.items() if "egg-info" not in name}
    made_by_setuptools = {"PKG-INFO", "setup.cfg"}
    expected = {f"src/{name}" for name in packaged()} | {"LICENSE", "README.md", "pyproject.toml"}
    assert set(held) - made_by_setuptools - {"MANIFEST.in"} == expected
    assert {f"src/{name}": content for name, content in packaged().items()}.items() <= held.items()


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_tree(distributions: Distributions) -> None:
    assert sorted(distributions.wheel_of_sdist) == sorted(distributions.wheel)
    assert distributions.wheel_of_sdist == distributions.wheel


def test_the_wheel_carries_the_license(distributions: Distributions) -> None:
    assert dist_info(distributions.wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata(distributions)["License-Expression"] == "Apache-2.0"


def test_the_wheel_installs_one_command(distributions: Distributions) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(dist_info(distributions.wheel, "entry_points.txt"))
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {"qie": "qie.compiler.cli.app:main"}
    }
    assert callable(cli.main)


def test_the_base_installs_the_thin_runtime_alone(distributions: Distributions) -> None:
    requirements = [Requirement(text) for text in metadata(distributions).get_all("Requires-Dist", [])]
    base = {canonicalize_name(r.name) for r in requirements if "extra ==" not in str(r.marker)}
    assert base == DEPENDENCIES


def test_the_extras_exist(distributions: Distributions) -> None:
    assert set(metadata(distributions).get_all("Provides-Extra", [])) >= EXTRAS


def test_what_the_wheel_installs_finds_its_recipes(distributions: Distributions, tmp_path: Path) -> None:
    for name, content in distributions.wheel.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    script = (
        "from qie.compiler.recipe import schema as recipe; print(recipe.__file__, *recipe.recipe_names(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    file, *names = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


# Public names and imports


def defined_names(source: str) -> Iterator[str]:
    """Yield the names that a module's own top-level statements define."""
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case _:
                pass


@pytest.mark.parametrize(("path", "name"), list(zip(SOURCES, MODULES, strict=True)), ids=MODULES)
def test_a_module_lists_its_public_names(path: Path, name: str) -> None:
    public = {word for word in defined_names(path.read_text(encoding="utf-8")) if not word.startswith("_")}
    listed = getattr(importlib.import_module(name), "__all__", None)
    assert public == set() or listed, f"{name} defines {', '.join(sorted(public))} and has no __all__"


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert [word for word in listed if not hasattr(module, word)] == []
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("qie.engines", NOT_IN_ENGINES), ("qie.compiler", NOT_IN_COMPILER)],
    ids=["engines", "compiler"],
)
def test_every_module_imports_without(package: str, blocked: tuple[str, ...]) -> None:
    modules = [name for name in MODULES if name == package or name.startswith(package + ".")]
    done = run_import(blocked, modules)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_test_of_imports_can_fail() -> None:
    done = run_import(("numpy",), ["qie.engines", "qie.engines.inputs.rotary"])
    assert done.returncode == 1
    assert done.stdout.startswith("qie.engines.inputs.rotary: ")


def run_import(blocked: tuple[str, ...], modules: list[str]) -> subprocess.CompletedProcess[str]:
    """Import ``modules`` in a process of its own where the packages ``blocked`` seem not to be installed."""
    command = [sys.executable, "-c", IMPORT, ",".join(blocked), ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Errors


class DrawnError(NamedTuple):
    """A line of the drawing in the docstring of errors.py."""

    parent: str
    meaning: str
    exit_code: int


def drawn_errors(drawing: str) -> dict[str, DrawnError]:
    """Return the drawn tree by name; every level is indented by four characters."""
    drawn: dict[str, DrawnError] = {}
    above: list[str] = []
    pattern = re.compile(r"^ {4}([ │├└─]*)(\w+Error) +(.+?)(?: +\(exit code (\d+)\))?$", re.MULTILINE)
    for branch, name, meaning, code in pattern.findall(drawing):
        depth, rest = divmod(len(branch), 4)
        assert rest == 0, name
        above[depth:] = [name]
        drawn[name] = DrawnError(above[depth - 1] if depth else "Exception", meaning, int(code or 2))
    return drawn


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn = drawn_errors(str(errors.__doc__))
    assert {name: error.parent for name, error in drawn.items()} == {
        error.__name__: error.__base__.__name__ for error in ERRORS if error.__base__
    }
    assert list(drawn) == [error.__name__ for error in ERRORS]
    assert sorted(drawn) == errors.__all__


def test_the_drawn_exit_codes_are_the_real_ones() -> None:
    drawn = drawn_errors(str(errors.__doc__))
    assert {name: error.exit_code for name, error in drawn.items()} == {e.__name__: e.exit_code for e in ERRORS}
    assert {name for name, error in drawn.items() if error.exit_code == 1} == {"ValidationError"}


@pytest.mark.parametrize("error", ERRORS[1:], ids=lambda error: error.__name__)
def test_the_drawn_meaning_of_an_error_begins_as_its_docstring(error: type[errors.QieError]) -> None:
    said = str(inspect.getdoc(error)).rstrip(".").lower()
    assert drawn_errors(str(errors.__doc__))[error.__name__].meaning.lower().startswith(said)


def test_the_tree_has_no_branch_elsewhere() -> None:
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, errors.QieError):
                assert value in ERRORS, f"{name}.{value.__name__}"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_the_command_line_ends_with_the_exit_code_of_an_error(
    error: type[errors.QieError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error("found this; do that")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == (1 if error is errors.ValidationError else 2)
    assert capsys.readouterr() == ("", "error: found this; do that\n")


# Files


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def git(*words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """Run git in the repository; skips where there is no git or no repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git repository, or git is not installed")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=False)


def versioned() -> dict[str, bytes]:
    """Return the content of every file under git by its path; links are left out."""
    listed = git("ls-files", "-z")
    assert listed.returncode == 0, listed.stderr
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in paths if p.is_file() and not p.is_symlink()}


def lines_with(pattern: re.Pattern[bytes]) -> list[str]:
    """Return the places under git where ``pattern`` is found, as file:line."""
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
