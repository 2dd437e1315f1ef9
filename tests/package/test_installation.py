"""The commands that install onnxruntime for a GPU, run by pip on small wheels that share a module as the real do."""

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qie.engines.backends import BACKENDS
from tests.support.repository import ROOT

INSTALL = str(BACKENDS["onnxruntime"].gpu_install)
MODULE = "onnxruntime/__init__.py"
GPU_ONLY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"


def write_wheel(folder: Path, name: str, version: str, requires: Iterable[str], files: dict[str, str]) -> None:
    """A wheel of pure Python with the extras cuda and cudnn."""
    stem = f"{name.replace('-', '_')}-{version}"
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    extras = [f"Provides-Extra: {extra}" for extra in ("cuda", "cudnn")]
    contents = {
        **files,
        f"{stem}.dist-info/METADATA": "\n".join([*head, *extras, *(f"Requires-Dist: {text}" for text in requires), ""]),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD"
    contents[record] = "".join(f"{path},,\n" for path in [*contents, record])
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for path, content in contents.items():
            archive.writestr(path, content)


def requirements() -> list[str]:
    """What qie requires of the two packages, by the project's own pyproject.toml, on any machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = [text for text in project["dependencies"] if Requirement(text).name == "onnxruntime"]
    extra = [text.partition(";")[0] for text in project["optional-dependencies"]["cuda"]]
    assert base and extra
    return [*base, *(f"{text}; extra == 'cuda'" for text in extra)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "qie", "0.1", requirements(), {"qie/__init__.py": ""})
    write_wheel(folder, "onnxruntime", "1.32.0", (), {MODULE: "PROVIDERS = ['CPU']"})
    write_wheel(folder, "onnxruntime-gpu", "1.31.1", (), {MODULE: "PROVIDERS = ['CUDA', 'CPU']", GPU_ONLY: ""})
    return folder


class Environment:
    """A virtual environment whose pip finds nothing but ``wheels``."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        self.variables = {**kept, **offline, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(self, command: str) -> str:
        done = subprocess.run(["sh", "-c", command], env=self.variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def providers(self) -> str:
        return self.run("python -c 'import onnxruntime; print(*onnxruntime.PROVIDERS)'")


@pytest.fixture(scope="module")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"), wheels)
    environment.run("pip install qie")
    assert environment.providers() == "CPU"
    return environment


def test_the_extra_alone_leaves_one_package_over_the_other(environment: Environment) -> None:
    """Why there are three commands: pip installs both packages, and the later one writes over the earlier one."""
    environment.run("pip install 'qie[cuda]'")
    installed = environment.run("pip list --format freeze")
    assert "onnxruntime==1.32.0" in installed
    assert "onnxruntime-gpu==1.31.1" in installed


@pytest.mark.parametrize(
    "before",
    ["pip install qie", "pip install --no-deps onnxruntime-gpu", "pip uninstall --yes onnxruntime onnxruntime-gpu"],
    ids=["for a CPU", "both", "neither"],
)
def test_the_commands_leave_the_package_for_a_gpu(environment: Environment, before: str) -> None:
    environment.run(before)
    for _ in range(2):
        environment.run(INSTALL)
        assert environment.providers() == "CUDA CPU"
        installed = environment.run("pip list --format freeze").splitlines()
        assert "onnxruntime-gpu==1.31.1" in installed
        assert not any(line.startswith("onnxruntime==") for line in installed)


def test_the_readme_has_the_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if "[compile,cuda]" in line)
    written = " && ".join(line.strip().partition("  ")[0] for line in lines[start : start + 3])
    assert written.replace('".[compile,cuda]"', "'qie[cuda]'") == INSTALL
