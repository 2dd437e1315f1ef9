"""The links of src/qie, and what wheel and sdist hold."""

import configparser
import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from qie.compiler.cli.main import main
from tests.support.repository import FOLDERS, ROOT, SOURCES

DEPENDENCIES = {"numpy", "onnxruntime", "pillow", "tokenizers", "typer"}
EXTRAS = {"compile", "cuda", "dev", "reference", "rtx", "tensorrt"}

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""
"""Builds the distribution of the folder that it runs in: what pip calls, without pip."""


class Distributions(NamedTuple):
    """What was built, file by file: name to content. The sdist's names are without its leading folder."""

    wheel: dict[str, bytes]
    sdist: dict[str, bytes]
    wheel_of_sdist: dict[str, bytes]


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
    """Build the wheel or the sdist of ``tree`` in a process of its own."""
    destination.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(destination)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = destination.iterdir()
    return file


def read_wheel(path: Path) -> dict[str, bytes]:
    """The content of every file of a wheel by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packaged() -> dict[str, bytes]:
    """What must be installed, by its name below the import root's parent."""
    recipes = [*(ROOT / "recipes").glob("*.toml"), ROOT / "recipes" / "README.md"]
    for folder in ("calibration", "pocket"):
        recipes += [path for path in (ROOT / "recipes" / folder).rglob("*") if path.is_file()]
    pages = [*(ROOT / "compiler").rglob("*.css"), *(ROOT / "engines" / "serving" / "http" / "static").iterdir()]
    files = {f"qie/{path.relative_to(ROOT)}": path.read_bytes() for path in [*SOURCES, *recipes, *pages]}
    return files | {f"qie/{name}": (ROOT / "src" / "qie" / name).read_bytes() for name in ("__init__.py", "py.typed")}


def dist_info(wheel: dict[str, bytes], name: str) -> str:
    """A file of the wheel's metadata."""
    (content,) = (text for path, text in wheel.items() if re.fullmatch(rf"qie-[^/]+\.dist-info/{name}", path))
    return content.decode()


def metadata(distributions: Distributions) -> Message:
    """The wheel's METADATA."""
    return email.message_from_string(dist_info(distributions.wheel, "METADATA"))


def test_the_wheel_holds_sources_pages_and_recipes_and_nothing_else(distributions: Distributions) -> None:
    held = {name: content for name, content in distributions.wheel.items() if ".dist-info/" not in name}
    assert sorted(held) == sorted(packaged())
    assert held == packaged()


def test_the_wheel_is_small(distributions: Distributions) -> None:
    """The pocket model included: weights of at most 24 MB, and a golden file of at most 2 MB."""
    tensors = {name: len(content) for name, content in distributions.wheel.items() if name.endswith(".safetensors")}
    assert tensors.pop("qie/recipes/pocket/golden.safetensors") < 2e6
    assert 20e6 < sum(tensors.values()) < 24e6
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
        "console_scripts": {"qie": "qie.compiler.cli.main:main"}
    }
    assert callable(main)


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
    script = "from qie.compiler.recipe import load; print(load.__file__, *load.recipe_names(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    file, *names = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
