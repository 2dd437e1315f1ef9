"""Fixtures of the tests on a GPU: a bundle of a small checkpoint for each backend, and reference runs on the CPU.

Without a GPU every test in this folder is deselected. A backend that is not installed, or that cannot build for this
GPU, is skipped with its reason. With ``--require-gpu`` a run in which no test passed is a failure.
"""

import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from qie.compiler.selftest.recording import RecordingStages, Run
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.machine import this_machine
from tests.support.editors import uncached_editor
from tests.support.gpu_bundles import WIDE, build_for_gpu, edit_request
from tests.support.images import smooth_image

BACKENDS = ["tensorrt-rtx", "tensorrt", "onnxruntime"]
MEASURED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail where no test ran on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the last line of the report
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--require-gpu", default=False) and not reporter.stats.get("passed"):
        reason = "every backend was skipped or failed, see above" if this_machine().gpus else "qie sees none here"
        reporter.write_line(f"no test ran on a GPU: {reason}; `qie doctor` lists what is missing", red=True)
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[MEASURED]:
        terminalreporter.section("measured")
        terminalreporter.write("\n".join([*config.stash[MEASURED], ""]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        item.add_marker("gpu")
    if not this_machine().gpus:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(autouse=True)
def qie_home() -> Path:
    """One home for all tests in this folder: kernels that TensorRT for RTX compiled are kept in its cache."""
    return Path(os.environ["QIE_HOME"])


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep a line for the end of the report: numbers whose bounds no GPU has confirmed yet."""
    return lambda line: request.config.stash[MEASURED].append(f"{request.node.name}: {line}")


@pytest.fixture(scope="session", params=BACKENDS)
def on_gpu(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small checkpoint's bundle for this GPU, built once per backend."""
    return build_for_gpu(checkpoint, tmp_path_factory.mktemp("gpu") / request.param, request.param)


@pytest.fixture(scope="session", params=BACKENDS[:2])
def on_tensorrt(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same for the backends with an arena and CUDA graphs."""
    return build_for_gpu(checkpoint, tmp_path_factory.mktemp("tensorrt") / request.param, request.param)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are large beside the driver's own memory."""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE, seed=1, dtype="bfloat16")


@pytest.fixture(scope="session")
def runs_on_cpu(bundle: Path) -> list[Run]:
    """Every run of an edit of two images with a batch of two results, in float32 on the CPU."""
    runs: list[Run] = []
    opened = open_bundle(str(bundle))
    editor = uncached_editor(opened)
    editor.stages = RecordingStages(opened, runs)
    editor.edit(edit_request(images=[smooth_image(150, 90), smooth_image(60, 80, 1)], seeds=[3, 4], steps=2))
    return runs


@pytest.fixture(scope="session")
def cpu_editor(bundle: Path) -> Editor:
    return uncached_editor(open_bundle(str(bundle)))
