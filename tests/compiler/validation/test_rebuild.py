"""Graphs that are built again: of the bundle's own checkpoint, LoRAs and quantization, for the CPU in float32."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.packing.build import build as carry_out
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.rebuild import cpu_recipe, find_model, other_graphs, plan_rebuild
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import CheckpointError
from tests.support.bundles import build

GPU = """\
schema = 2
gpu = "L40S"
compute_capability = "8.9"
memory_gib = 44
backends = ["onnxruntime"]
noise = "float32"
[shapes]
batch = { max = 2 }
[gates.components]
vision = 0.02
"""


def recipe_of(bundle: Bundle) -> Recipe:
    return parse_recipe(bundle.manifest.recipe.toml, bundle.path)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path, generator = tmp_path / "style.safetensors", np.random.default_rng(5)
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {
            f"{name}.lora_A.weight": generator.standard_normal((2, 64), dtype=np.float32),
            f"{name}.lora_B.weight": generator.standard_normal((64, 2), dtype=np.float32),
        },
        str(path),
    )
    return path


def test_the_recipe_of_the_cpu_keeps_schemes_shapes_and_gates() -> None:
    own = parse_recipe('extends = "l40s"\n', Path("mine.toml"))
    cpu = cpu_recipe(own)
    assert cpu.compute_capability is None and cpu.backends == ("onnxruntime",)
    assert cpu.gates == own.gates and cpu.shapes == own.shapes and cpu.schedules == own.schedules
    for component in COMPONENTS:
        assert cpu.components[component] == replace(own.components[component], precision="float32")


def test_only_pocket_is_known_without_being_named(bundle: Path, pocket_bundle: Path) -> None:
    assert find_model(open_bundle(bundle)) is None
    assert find_model(open_bundle(pocket_bundle)) is not None


def test_a_bundle_with_a_lora_is_built_again_with_it(checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    bundle = open_bundle(build(checkpoint, tmp_path / "gpu", GPU, loras=[(lora, 0.5)]).path)

    def rebuilt(name: str, loras: Sequence[tuple[Path, float]]) -> Bundle:
        planned = plan_rebuild(bundle, recipe_of(bundle), str(checkpoint), tmp_path / name, loras=loras)
        assert other_graphs(bundle, planned.own, tmp_path / f"{name} graphs") == []
        return carry_out(planned.cpu)

    again = rebuilt("again", [(lora, 0.5)])
    direct = build(checkpoint, tmp_path / "direct", loras=[(lora, 0.5)])
    weights = "transformer.weights"
    assert (again.path / weights).read_bytes() == (direct.path / weights).read_bytes()
    for loras in ([], [(lora, 1.0)]):
        with pytest.raises(
            CheckpointError, match=r"the LoRAs are not those of gpu, which has style.safetensors:0\.5; name these"
        ):
            rebuilt("other", loras)


def test_another_checkpoint_is_refused(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(CheckpointError, match="was built from tiny with .*; name the checkpoint of the bundle"):
        plan_rebuild(opened, recipe_of(opened), "pocket", tmp_path / "graphs")


@pytest.mark.parametrize("change", [{"backend_version": "1.0"}, {"backend": "tensorrt-rtx"}, {"key": "0" * 64}])
def test_an_engine_of_another_version_backend_or_graph_has_another_key(
    checkpoint: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    """No backend has to be installed for that, tensorrt least of all."""
    bundle = open_bundle(build(checkpoint, tmp_path / "gpu", GPU).path)
    planned = plan_rebuild(bundle, recipe_of(bundle), str(checkpoint), tmp_path / "graphs")
    first, *others = bundle.manifest.engines
    claimed = replace(bundle.manifest, engines=(replace(first, **change), *others))
    assert other_graphs(replace(bundle, manifest=claimed), planned.own, tmp_path / "own") == [
        "vision was built from another graph, or by another version of qie or ONNX"
    ]
