"""The bisect: the first block and the first operation that leave the reference, and what they read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray

from qie.compiler.recipe.gates import Gates, TrajectoryGates
from qie.compiler.validation.report import Bisection, Report
from qie.compiler.validation.run import Options, validate
from qie.engines.bundle.manifest import Component
from tests.support.bundles import build
from tests.support.faults.graph import weight_changed

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


def broken(sound: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of a bundle that was changed, with a manifest that fits it."""
    copied = Path(shutil.copytree(sound, folder / "broken"))
    change(copied)
    return copied


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
    def without(bias: NDArray[Any]) -> None:
        bias[:] = 0

    change = weight_changed("transformer", "transformer_blocks.3.attn.to_v.bias", without)
    report = bisected(broken(pocket_bundle, tmp_path, change))
    found = of(report, "transformer")
    assert found.first_operation == "transformer_blocks.3.attn.to_v"
    assert found.first_block is not None and found.first_block.startswith("transformer_blocks.3")
    assert all(of(report, c).first_operation is None for c in ("vision", "language", "vae_encoder", "vae_decoder"))
    (check,) = [check for check in report.checks if check.name == "blocks" and check.case == "transformer"]
    assert check.result == "failed" and "transformer_blocks.3.attn.to_v the first operation" in check.detail


def test_a_failing_component_is_bisected_without_being_asked(pocket_bundle: Path, tmp_path: Path) -> None:
    def larger(weight: NDArray[Any]) -> None:
        weight *= 1.5

    change = weight_changed("vision", "visual.blocks.1.mlp.down_proj.weight", larger)
    report = validate(broken(pocket_bundle, tmp_path, change), Options(level="trajectory"))
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
