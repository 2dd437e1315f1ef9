"""Fixtures of the tests on a GPU: a bundle of a small checkpoint for each backend, and reference runs on the CPU.

Without a GPU every test in this folder is deselected. A backend that is not installed, or that cannot build for this
GPU, is skipped with its reason.
"""

from pathlib import Path

import pytest

from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing import stages as stages_module
from qie.engines.editing.editor import Editor
from qie.engines.machine import this_machine
from qie.engines.sessions.load import load as load_session
from tests.support.gpu_bundles import WIDE, Recorder, Run, build_for_gpu, edit_request
from tests.support.images import smooth_image

BACKENDS = ["tensorrt-rtx", "tensorrt", "onnxruntime"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        item.add_marker("gpu")
    if not this_machine().gpus:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "load", lambda f, e, *more: Recorder(load_session(f, e, *more), e, runs))
        request = edit_request(images=[smooth_image(150, 90), smooth_image(60, 80, 1)], seeds=[3, 4], steps=2)
        Editor(open_bundle(str(bundle))).edit(request)
    return runs


@pytest.fixture(scope="session")
def cpu_editor(bundle: Path) -> Editor:
    return Editor(open_bundle(str(bundle)))
