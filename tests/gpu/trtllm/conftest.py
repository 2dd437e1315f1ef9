"""Bundles whose language model is an engine of TensorRT-LLM, one a scheme, and the same model on the CPU.

The tests are deselected where TensorRT-LLM is not installed; ``make test-gpu-trtllm`` installs it.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing import build as packing
from qie.compiler.packing.export import export_graphs
from qie.compiler.planning.plan import Plan
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import calibrate_model
from qie.compiler.quantization.samples import draw_samples, read_images
from qie.compiler.selftest.recording import RecordingStages, Run
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.machine import this_machine
from tests.support.bundles import build, planned
from tests.support.gpu_bundles import HEADS, edit_request, recipe_for
from tests.support.images import smooth_image

SCHEMES = ("none", "fp8", "int8-smooth", "w8a16", "w4a16")

LANGUAGE = """
[components.language]
backend = "tensorrt-llm"
scheme = "{scheme}"
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    if mine and find_spec("tensorrt_llm") is None:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@pytest.fixture(scope="session")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("heads") / "heads", HEADS, seed=1)


@pytest.fixture(scope="session")
def calibration(wide_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    for number, size in enumerate([(150, 90), (80, 120)]):
        smooth_image(*size, number).save(folder / f"{number}.png")
    path = folder / "c.npz"
    calibrate_model(open_checkpoint(str(wide_heads)), draw_samples(read_images(folder, 2), INSTRUCTIONS, 4), path)
    return path


@pytest.fixture(scope="session")
def cpu_bundle(wide_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(str(build(wide_heads, tmp_path_factory.mktemp("heads-cpu") / "cpu").path))


@pytest.fixture(scope="session")
def language_run(cpu_bundle: Bundle) -> Run:
    """The language model of an edit of one image, in float32 on the CPU."""
    runs: list[Run] = []
    editor = Editor(cpu_bundle)
    editor.stages = RecordingStages(cpu_bundle, runs)
    editor.edit(edit_request(steps=1, guidance=1.0))
    (run,) = [run for run in runs if run.component == "language"]
    return run


@pytest.fixture(scope="session", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    capability = tuple(map(int, this_machine().gpus[0].compute_capability.split(".")))
    if request.param == "fp8" and capability < (8, 9):
        pytest.skip("a GPU before Ada has no FP8")
    if request.param != "fp8" and request.param != "none" and (10, 0) <= capability < (12, 0):
        pytest.skip("TensorRT-LLM 1.2.1 builds no integer weights for Blackwell of data centers")
    return str(request.param)


@pytest.fixture(scope="session")
def plan(scheme: str, wide_heads: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The bundle of the small checkpoint for this GPU; the components but the language model are TensorRT's."""
    recipe = recipe_for("tensorrt", "resident") + LANGUAGE.format(scheme=scheme)
    used = None if scheme == "none" else calibration
    return planned(wide_heads, tmp_path_factory.mktemp("trtllm") / scheme, recipe, calibration=used)


@pytest.fixture(scope="session")
def on_trtllm(plan: Plan) -> Bundle:
    """The bundle of ``plan``, built once per scheme."""
    return packing.build(plan)


@pytest.fixture(scope="session")
def llm_checkpoint(plan: Plan) -> Path:
    """What the engine of TensorRT-LLM is built from, which the bundle does not keep."""
    exported = replace(plan, destination=plan.destination.with_name(f"{plan.destination.name}-exported"))
    (config,) = (path for path in export_graphs(exported, weights=True) if path.name == "config.json")
    return config.parent
