"""Parts in a plan: as few as fit into the host memory of the build, or as many as the recipe says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.graphs.parts import balanced, block_bytes
from qie.compiler.planning import parts as module
from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.fit import refusal
from qie.compiler.planning.keys import graph_keys
from qie.compiler.planning.parts import HOST_BASE, build_bytes, divided, host_memory
from qie.compiler.planning.plan import Plan, PlannedComponent
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.manifest import Component
from qie.engines.errors import BuildError, RecipeError
from tests.support.bundles import planned

GIB = 2**30
L40S = load_recipe("l40s")


def with_parts(recipe: Recipe, **parts: int) -> Recipe:
    sections = {name: replace(recipe.components[name], parts=count) for name, count in parts.items()}  # type: ignore[index]
    return replace(recipe, components=replace(recipe.components, **sections))


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Of the pocket model's transformer, with five blocks."""
    return GRAPHS["transformer"](open_checkpoint(str(POCKET), weights=False).model, "bfloat16")


def needed(graph: Graph, count: int) -> int:
    """Host memory for so many parts: 0.2 GB and 1.6 times the weights of the largest."""
    sizes, start, largest = block_bytes(graph), 0, 0
    for blocks in balanced(sizes, count):
        largest = max(largest, sum(sizes[start : start + blocks]))
        start += blocks
    return HOST_BASE + int(1.6 * largest)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_fewest_parts_that_fit(graph: Graph, count: int) -> None:
    assert len(divided(graph, L40S, ["tensorrt-rtx"], needed(graph, count))) == count
    fewer = divided(graph, L40S, ["tensorrt-rtx"], needed(graph, count) - 1)
    assert len(fewer) > count if count < 5 else fewer == (graph,)  # none fits: the estimate says so


def test_what_is_not_compiled_stays_whole(graph: Graph) -> None:
    assert divided(graph, L40S, ["onnxruntime"], 1) == (graph,)
    assert divided(graph, L40S, ["tensorrt-llm"], 1) == (graph,)
    whole = total_bytes(graph.weights)
    assert divided(graph, L40S, ["tensorrt-rtx"], build_bytes("tensorrt-rtx", graph, whole)) == (graph,)


def test_the_backend_that_takes_more_decides(graph: Graph) -> None:
    """TensorRT holds 2.1 times the weights."""
    memory = needed(graph, 2)
    assert len(divided(graph, L40S, ["tensorrt-rtx"], memory)) < len(
        divided(graph, L40S, ["tensorrt-rtx", "tensorrt"], memory)
    )


def test_a_recipe_says_how_many(graph: Graph) -> None:
    assert len(divided(graph, with_parts(L40S, transformer=4), ["tensorrt-rtx"], 1 << 50)) == 4
    assert len(divided(graph, with_parts(L40S, transformer=2), ["onnxruntime"], 1 << 50)) == 2
    assert divided(graph, with_parts(L40S, transformer=1), ["tensorrt-rtx"], 1) == (graph,)
    with pytest.raises(RecipeError, match=r"^components\.transformer\.parts is 6, and transformer has 5 blocks; lower"):
        divided(graph, with_parts(L40S, transformer=6), ["tensorrt-rtx"], 1 << 50)


def test_memory_that_a_build_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_bytes", lambda: 10 * GIB)
    limited = replace(L40S, limits=replace(L40S.limits, host_memory_gib=6))
    assert host_memory(L40S, None) == 9 * GIB
    assert host_memory(limited, None) == 6 * GIB
    assert host_memory(replace(limited, limits=replace(L40S.limits, host_memory_gib=60)), None) == 9 * GIB
    assert host_memory(limited, 20) == 20 * GIB
    for memory_gib in (0, 1e9, float("nan")):
        with pytest.raises(BuildError, match="GiB of host memory were chosen, expected 0.25 to 4096; choose"):
            host_memory(L40S, memory_gib)


def component(plan: Plan, name: Component) -> PlannedComponent:
    return next(p for p in plan.components if p.component == name)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Plan]:
    """The pocket model for the L40S, the transformer in one and in three parts."""
    folder = tmp_path_factory.mktemp("plans")
    recipe = replace(L40S, backends=("tensorrt-rtx",), shapes=replace(L40S.shapes, min_side=32))
    return {
        count: planned("pocket", folder / f"{count}", with_parts(recipe, transformer=count), weights=False)
        for count in (1, 3)
    }


def test_what_parts_take(plans: dict[int, Plan]) -> None:
    """The largest part decides the memory of the build and what is deleted behind it; all weights are on the GPU."""
    one, three = (component(plans[count], "transformer") for count in (1, 3))
    assert len(three.parts) == 3 and three.graph.digest() == one.graph.digest()
    sizes = [total_bytes(part.weights) for part in three.parts]
    assert three.bytes == sum(sizes) == pytest.approx(one.bytes, rel=0.01)
    assert three.transient_bytes in (max(sizes), 0)
    whole, parts = (
        next(c for c in estimate(plans[count]).components if c.component == "transformer") for count in (1, 3)
    )
    assert (whole.parts, parts.parts) == (1, 3)
    assert parts.host_bytes == HOST_BASE + int(1.6 * max(sizes)) < whole.host_bytes
    assert parts.weights_bytes == pytest.approx(whole.weights_bytes, rel=0.01)
    assert parts.largest_activation_bytes <= 1.1 * whole.largest_activation_bytes
    batch, width = L40S.shapes.batch.max, plans[1].model.transformer.width
    first, _, _ = three.parts
    (image, text) = first.outputs
    assert image.dims[-1] == text.dims[-1] == width
    states = parts.largest_io_bytes - whole.largest_io_bytes
    assert states % (2 * batch * width * 2) == 0 and states > 0  # bfloat16, in two sets


def test_every_part_has_a_key_of_its_own(plans: dict[int, Plan]) -> None:
    one, three = (graph_keys(plans[count], "digest") for count in (1, 3))
    assert len(three["transformer"]) == len(set(three["transformer"])) == 3
    assert not set(one["transformer"]) & set(three["transformer"])
    assert {name: key for name, key in one.items() if name != "transformer"} == {
        name: key for name, key in three.items() if name != "transformer"
    }


def test_parts_of_the_recipe_that_do_not_fit(plans: dict[int, Plan]) -> None:
    found = estimate(replace(plans[3], memory=HOST_BASE))
    vision_aside = replace(found, components=tuple(c for c in found.components if c.component == "transformer"))
    assert str(refusal(vision_aside)).endswith(
        " of host memory in 3 parts, as the recipe says, for weights of 0.0 GiB, and the build may use 0.2 GiB; leave "
        "components.transformer.parts out, or build on a machine with more memory"
    )


def test_the_command_line(qie: Callable[..., CompletedProcess[str]], refusal: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('extends = "cpu"\n[components.transformer]\nparts = 2\n')
    done = qie("build", "pocket", "--gpu", recipe, "--dry-run")
    assert "transformer, 2 parts" in done.stdout
    assert "2" in next(
        line for line in qie("plan", "pocket", "--gpu", recipe).stdout.splitlines() if "transformer " in line
    )
    message = refusal(qie("build", "pocket", "--gpu", recipe, "--memory-gib", "0.1"))
    assert "0.1 GiB of host memory were chosen, expected 0.25 to 4096; choose what the build may use" in message
    message = refusal(qie("build", "--finish", "x", "--memory-gib", "8"))
    assert "a bundle is finished in the parts that it has" in message
