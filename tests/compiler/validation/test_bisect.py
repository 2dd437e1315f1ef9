"""The bisect: the first block and the first operation that leave the reference, and what they read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qie.compiler.recipe.gates import Gates, TrajectoryGates
from qie.compiler.validation.onnx_file import read_graph
from qie.compiler.validation.report import Bisection, Report
from qie.compiler.validation.run import Options, validate
from qie.engines.bundle.manifest import Component
from tests.support.bundles import build
from tests.support.damage import reseal

INT8 = """\
extends = "cpu"
[components.transformer]
scheme = "int8-smooth"
[gates.trajectory]
block = 0.1
"""


def bisected(path: Path) -> Report:
    return validate(path, Options(level="trajectory", bisect=True))


def of(report: Report, component: Component) -> Bisection:
    return next(found for found in report.bisections if found.component == component)


def broken(sound: Path, folder: Path, component: Component, change: Callable[[Path, onnx.ModelProto], None]) -> Path:
    """A copy of a bundle whose graph and weights of ``component`` are changed, with a manifest that fits them."""
    copied = Path(shutil.copytree(sound, folder / "broken"))
    graph = copied / f"{component}.onnx"
    model = read_graph(graph)
    change(copied, model)
    graph.write_bytes(model.SerializeToString())
    reseal(copied)
    return copied


def weight(folder: Path, model: onnx.ModelProto, name: str) -> np.memmap:
    """A float32 weight, mapped from its file for writing."""
    tensor = next(w for w in model.graph.initializer if w.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(folder / place["location"], np.float32, "r+", int(place.get("offset", 0)), tuple(tensor.dims))


@pytest.fixture(scope="module")
def sound(pocket_bundle: Path) -> Report:
    return bisected(pocket_bundle)


def test_every_operation_of_a_sound_bundle_is_close(sound: Report) -> None:
    counts = {found.component: len(found.operations) for found in sound.bisections}
    assert min(counts.values()) >= 20 and sum(counts.values()) > 250, counts
    for found in sound.bisections:
        assert found.first_block is None and found.first_operation is None
        assert all(operation.relative_l2 < 2e-5 for operation in found.operations), found.component


def test_an_operation_names_its_tensors_and_the_lines_that_write_it(sound: Report) -> None:
    by_name = {operation.name: operation for operation in of(sound, "transformer").operations}
    to_q = by_name["transformer_blocks.2.attn.to_q"]
    assert to_q.tensors == ("transformer_blocks.2.attn.to_q.weight", "transformer_blocks.2.attn.to_q.bias")
    assert to_q.block == "transformer_blocks.2" and not to_q.whole_block
    for line in to_q.source.split(", "):
        file, number = line.split(":")
        assert "self." in (Path(__file__).parents[3] / file).read_text().splitlines()[int(number) - 1]
    block = by_name["transformer_blocks.2"]
    assert block.whole_block and set(to_q.tensors) < set(block.tensors)


def test_a_fault_is_found_where_it_is(pocket_bundle: Path, tmp_path: Path) -> None:
    def change(folder: Path, model: onnx.ModelProto) -> None:
        weight(folder, model, "transformer_blocks.3.attn.to_v.bias")[:] = 0

    report = bisected(broken(pocket_bundle, tmp_path, "transformer", change))
    found = of(report, "transformer")
    assert found.first_operation == "transformer_blocks.3.attn.to_v"
    assert found.first_block is not None and found.first_block.startswith("transformer_blocks.3")
    assert all(of(report, c).first_operation is None for c in ("vision", "language", "vae_encoder", "vae_decoder"))
    (check,) = [check for check in report.checks if check.name == "blocks" and check.case == "transformer"]
    assert check.result == "failed" and "transformer_blocks.3.attn.to_v the first operation" in check.detail


def test_a_failing_component_is_bisected_without_being_asked(pocket_bundle: Path, tmp_path: Path) -> None:
    def change(folder: Path, model: onnx.ModelProto) -> None:
        weight(folder, model, "visual.blocks.1.mlp.down_proj.weight")[:] *= 1.5

    report = validate(broken(pocket_bundle, tmp_path, "vision", change), Options(level="trajectory"))
    (found,) = report.bisections
    assert found.component == "vision" and found.first_operation == "visual.blocks.1.mlp.down_proj"


def test_smoothing_is_undone(tmp_path: Path) -> None:
    """The outputs that INT8 divides by smoothing scales are compared after multiplying them back."""
    report = bisected(build("pocket", tmp_path / "int8", INT8).path)
    found = of(report, "transformer")
    assert found.first_operation is None
    values = {o.name: o.relative_l2 for o in found.operations if o.name.endswith(("attn.to_v", "attn.add_v_proj"))}
    assert len(values) == 10 and max(values.values()) < 0.05, values


def test_the_gate_of_the_recipe_is_the_tolerance(sound: Report) -> None:
    assert {o.tolerance for found in sound.bisections for o in found.operations} == {5e-5}
    assert Gates().trajectory == TrajectoryGates(block=0.05)
