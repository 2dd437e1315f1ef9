"""Fixtures of the tests with the real vLLM: bundles of the pocket model with it and without, and inputs.

Where vLLM is not installed every test in this folder is deselected. `make test-vllm` installs it into an environment of
its own and requires that the tests run.
"""

import resource
import time
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.editing.stages import Stages
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PromptTokens, encode
from qie.engines.inputs.vision import VisionInputs, vision_inputs
from qie.engines.sessions.vllm.engine import ENVIRONMENT
from tests.support.bundles import build
from tests.support.repository import ROOT

BOTH = """
extends = "cpu"
[components.vision]
backend = "vllm"
[components.language]
backend = "vllm"
"""

PHOTOS = ("docs/images/cat.jpg", "recipes/pocket/cases/wide.png", "recipes/pocket/cases/tall-with-guidance.png")

MEASURED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-vllm", action="store_true", help="fail where no test ran with vLLM")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[MEASURED]:
        terminalreporter.section("measured with vLLM")
        terminalreporter.write("\n".join([*config.stash[MEASURED], ""]))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the last line of the report
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--require-vllm", default=False) and not reporter.stats.get("passed"):
        reporter.write_line("no test ran with vLLM; see above", red=True)
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.filterwarnings("default"))  # of vLLM and what it brings
    if find_spec("vllm") is None:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """What vLLM reads, also where the first test is not one of a session."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Keep a line for the end of the report."""
    start = time.perf_counter()
    lines: list[str] = []
    yield lines.append
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    after = f"({time.perf_counter() - start:.1f} s, peak of this process {memory:.2f} GB)"
    request.config.stash[MEASURED] += [f"{request.node.name}: {line} {after}" for line in lines]


@pytest.fixture(scope="session")
def plain(pocket_bundle: Path) -> Stages:
    """The graphs, with onnxruntime."""
    return Stages(open_bundle(pocket_bundle))


@pytest.fixture(scope="session")
def with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The pocket model with its text encoder in vLLM."""
    return build("pocket", tmp_path_factory.mktemp("vllm") / "pocket-vllm", BOTH)


Inputs = Callable[[int], tuple[VisionInputs, list[PromptTokens]]]


@pytest.fixture(scope="session")
def inputs(pocket_bundle: Path) -> Inputs:
    """The inputs of edits of so many images: a short prompt, the negative one, and one with text beyond ASCII."""
    opened = open_bundle(pocket_bundle)
    model, tokenizer = opened.manifest.model, open_tokenizer(opened)
    texts = ("tint it purple", " ", "make the 2nd image's – sky “blue” é  ")

    def make(images: int) -> tuple[VisionInputs, list[PromptTokens]]:
        pictures = [Image.open(ROOT / photo).convert("RGB") for photo in PHOTOS[:images]]
        vision = vision_inputs([prepare(picture, model.areas).vision for picture in pictures], model.vision)
        return vision, [encode(tokenizer, [text], vision.grids, model.prompt, allow_blank=True) for text in texts]

    return make


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative L2 error."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
