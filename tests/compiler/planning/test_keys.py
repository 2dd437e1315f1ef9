"""Cache keys: what each of them depends on, and what leaves it alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qie
from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.source import SOURCE
from qie.compiler.planning.keys import engine_key, graph_keys
from qie.compiler.planning.plan import Plan
from qie.compiler.recipe.load import load_recipe
from qie.engines.bundle.manifest import COMPONENTS, Component, ProfileRecord
from tests.support.bundles import planned

SHAPES = (ProfileRecord(input="image", min=(1, 32, 32, 3), opt=(1, 64, 64, 3), max=(1, 96, 128, 3)),)


@pytest.fixture(scope="module")
def plan(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(checkpoint, tmp_path_factory.mktemp("plan") / "out")


def changed(plan: Plan, other: Plan) -> set[Component]:
    """The components whose graphs get another key in ``other``."""
    keys, others = graph_keys(plan, "digest"), graph_keys(other, "digest")
    assert keys.keys() == others.keys() == set(COMPONENTS)
    return {component for component in keys if keys[component] != others[component]}


def with_component(plan: Plan, component: Component, **values: Any) -> Plan:
    components = tuple(replace(p, **values) if p.component == component else p for p in plan.components)
    return replace(plan, components=components)


def lora(digest: str, weight: float) -> Any:
    return SimpleNamespace(digest=lambda: digest, weight=weight)


def test_every_component_has_a_key_of_its_own(plan: Plan) -> None:
    keys = graph_keys(plan, "digest")
    assert len(set(keys.values())) == len(COMPONENTS)
    assert all([len(key) for key in parts] == [64] for parts in keys.values())
    assert changed(plan, plan) == set()


def test_the_destination_decides_nothing(plan: Plan, tmp_path: Path) -> None:
    assert changed(plan, replace(plan, destination=tmp_path)) == set()


def test_loras_decide_the_transformer_alone(plan: Plan) -> None:
    """Their content, their weights and their order."""
    first, second = lora("a", 1.0), lora("b", 1.0)
    both = replace(plan, loras=(first, second))
    for other in ((first,), (lora("c", 1.0), second), (lora("a", 0.5), second), (second, first)):
        assert changed(both, replace(plan, loras=other)) == {"transformer"}


def test_a_scheme_and_a_precision_decide_their_component_alone(plan: Plan) -> None:
    assert changed(plan, with_component(plan, "language", scheme="w4a16")) == {"language"}
    assert changed(plan, with_component(plan, "vision", precision="bfloat16")) == {"vision"}


def test_smoothing_scales_decide_by_group_and_value(plan: Plan) -> None:
    def smoothed(group: str, value: float) -> Plan:
        return with_component(plan, "transformer", smoothing_scales={group: np.full(4, value, np.float32)})

    assert changed(smoothed("a", 2), smoothed("a", 2)) == set()
    assert changed(smoothed("a", 2), smoothed("a", 3)) == {"transformer"}
    assert changed(smoothed("a", 2), smoothed("b", 2)) == {"transformer"}


def test_another_qie_decides_every_graph(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = graph_keys(plan, "digest")
    monkeypatch.setattr(qie, "__version__", "0.0.0")
    assert not set(before.values()) & set(graph_keys(plan, "digest").values())


def test_shapes_and_limits_decide_no_engine_on_the_cpu() -> None:
    recipe = load_recipe("cpu")
    narrow = replace(recipe, memory_gib=1.0, limits=replace(recipe.limits, build_workspace_gib=1.0))
    assert engine_key("graph", "onnxruntime", recipe, SHAPES) == engine_key("graph", "onnxruntime", narrow, ())
    assert engine_key("graph", "onnxruntime", recipe, ()) != engine_key("another", "onnxruntime", recipe, ())


def test_shapes_limits_and_target_decide_an_engine_on_a_gpu() -> None:
    recipe = load_recipe("a100")
    keys = [
        engine_key("graph", "onnxruntime", used, shapes)
        for used, shapes in (
            (recipe, SHAPES),
            (recipe, ()),
            (recipe, (replace(SHAPES[0], opt=(1, 96, 64, 3)),)),
            (replace(recipe, memory_gib=1.0), SHAPES),
            (replace(recipe, limits=replace(recipe.limits, build_workspace_gib=1.0)), SHAPES),
            (replace(recipe, compute_capability="9.0"), SHAPES),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_the_version_of_the_backend_decides_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("cpu")
    before = engine_key("graph", "onnxruntime", recipe, ())
    monkeypatch.setitem(BUILDERS, "onnxruntime", SimpleNamespace(version=lambda: "0.0.0"))
    assert engine_key("graph", "onnxruntime", recipe, ()) != before


def test_where_the_code_of_a_graph_stands_does_not_count(checkpoint: Path) -> None:
    graph = GRAPHS["vae_encoder"](open_checkpoint(str(checkpoint), weights=False).model, "float32")
    digest = graph.digest()
    for node in graph.model.graph:
        assert node.metadata_props[SOURCE].startswith("compiler/graphs/vae.py:")
        node.metadata_props[SOURCE] = "compiler/graphs/vae.py:1"
    assert graph.digest() == digest
