"""The memory that a plan counts against what TensorRT for RTX reserves, at the published width."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.parts import split
from qie.compiler.planning.cost import cost
from qie.compiler.planning.parts import build_bytes
from qie.compiler.planning.profiles import largest_dims
from qie.compiler.recipe.load import load_recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.manifest import COMPONENTS
from tests.support.full_width import full_width_graph, full_width_model, write_full_width

pytest.importorskip("tensorrt_rtx")


CASES = [
    pytest.param(component, gpu, marks=[pytest.mark.soak] if gpu == "a100" or component == "transformer" else [])
    for component in COMPONENTS
    for gpu in ("l40s", "a100")
]
"""``test_full_width.py`` compares the transformer for the L40S, whose engine it compiles."""


LIBRARIES = 97_000_000
"""Resident bytes of the compiler's own files: the peak less the private memory and the weights of a build."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The transformer's last block is unlike the others; the vision tower has windows in all blocks but the last."""
    return full_width_model(tmp_path_factory.mktemp("full") / "c", transformer=2, language=1, vision=4)


@pytest.mark.slow
@pytest.mark.parametrize(("component", "gpu"), CASES)
def test_a_plan_counts_what_the_compiler_reserves(model: Model, component: Any, gpu: str, tmp_path: Path) -> None:
    """Within 10 %, with the recipe's profiles.

    Where the recipe quantizes, all linears are quantized, also those of the first and last blocks.
    """
    recipe = load_recipe(gpu)
    scheme = recipe.components[component].scheme
    graph, record = full_width_graph(component, model, recipe, None if scheme == "none" else scheme)
    written = write_full_width(graph, record, model, recipe, tmp_path)
    engine = BUILDERS["tensorrt-rtx"].build(written, tmp_path, key="k", recipe=recipe)
    for name in (engine.path, "weights"):
        (tmp_path / name).unlink()
    planned = cost(graph, largest_dims(component, recipe, model), compiled=True).activation_bytes
    assert planned == pytest.approx(engine.activation_bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.soak
def test_a_part_takes_the_host_memory_that_a_plan_counts(model: Model, tmp_path: Path) -> None:
    """Beside the weights and libraries, which are mapped from files: 0.2 GB and 1.6 times the bytes of the weights."""
    recipe = load_recipe("l40s")
    graph, record = full_width_graph("transformer", model, recipe, "fp8")
    assert record is not None
    for number, part in enumerate(split(graph, 2)):
        quantized = sum(weight.quantizer is not None and weight.scale_of is None for weight in part.weights)
        written = write_full_width(part, replace(record, quantized=quantized), model, recipe, tmp_path)
        engine = BUILDERS["tensorrt-rtx"].build(replace(written, part=number), tmp_path, key="k", recipe=recipe)
        weights = total_bytes(part.weights)
        planned, measured = build_bytes("tensorrt-rtx", part, weights), engine.build_peak_bytes - weights - LIBRARIES
        assert 0.5 * planned <= measured <= planned, f"measured {measured:,}, planned {planned:,} bytes"
        assert engine.part == number
        (tmp_path / engine.path).unlink()
