"""Engines of layers of the published width, compiled by TensorRT for RTX."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.planning.cost import cost
from qie.compiler.planning.profiles import largest_dims
from qie.compiler.recipe.load import load_recipe
from qie.engines.bundle.manifest import GraphRecord
from tests.support.full_width import full_width_graph, full_width_model, write_full_width

pytest.importorskip("tensorrt_rtx")

RTX = BUILDERS["tensorrt-rtx"]

LAYERS = {"transformer": 2, "vision": 2, "language": 1}


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[GraphRecord, Path, int]]:
    """A component with the layers of LAYERS and its planned bytes; with a scheme, all its linears are quantized."""
    folder = tmp_path_factory.mktemp("full")
    model, recipe = full_width_model(folder / "c", **LAYERS), load_recipe("l40s")

    def write(component: Any, scheme: Any = None) -> tuple[GraphRecord, Path, int]:
        graph, record = full_width_graph(component, model, recipe, scheme)
        planned = cost(graph, largest_dims(component, recipe, model), compiled=True).activation_bytes
        return write_full_width(graph, record, model, recipe, folder), folder, planned

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    "component",
    [
        pytest.param("transformer", marks=pytest.mark.soak),
        "vision",
        pytest.param("language", marks=pytest.mark.soak),
    ],
)
def test_attention_at_full_width(full_width: Callable[..., tuple[GraphRecord, Path, int]], component: str) -> None:
    graph, folder, _ = full_width(component)
    tokens = {"transformer": "rotary_cos", "vision": "patches", "language": "input_ids"}[component]
    heads = {"transformer": 24, "vision": 16, "language": 28}[component]
    (tokens_max,) = (
        max(p.max[:2]) if component == "language" else p.max[0] for p in graph.profiles if p.input == tokens
    )
    scores = heads * tokens_max**2 * 2
    for name in ("l40s", "a100"):
        engine = RTX.build(graph, folder, key="k", recipe=load_recipe(name))
        assert engine.structure is not None
        structure = json.loads((folder / engine.structure.path).read_text())
        assert structure["attention"] == {"layers": LAYERS[component], "fused": LAYERS[component], "types": ["bf16"]}
        assert structure["allocations"] == 0
        assert structure["largest_buffer_bytes"] < scores
        if component != "vision":  # whose scores are smaller than its feed-forward activations
            assert engine.activation_bytes is not None
            assert engine.activation_bytes < scores
        assert graph.files[0].bytes < engine.files[0].bytes < 1.1 * graph.files[0].bytes + 1e7
        assert engine.build_peak_bytes < 4e9
        (folder / engine.path).unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "gpu"),
    [
        pytest.param("fp8", "l40s", marks=pytest.mark.soak),
        pytest.param("int8-smooth", "a100-int8", marks=pytest.mark.soak),
    ],
)
def test_quantized_products_are_bfloat16(
    full_width: Callable[..., tuple[GraphRecord, Path, int]], scheme: str, gpu: str
) -> None:
    """The largest tensor is the feed-forward's, 12,288 channels of the image stream in bfloat16.

    Attention is fused, and the plan counts what the compiler reserves (``test_memory.py``).
    """
    graph, folder, planned = full_width("transformer", scheme)
    tokens = {p.input: p.max for p in graph.profiles}
    batch, noise, _ = tokens["latents"]
    image = batch * (noise + tokens["reference"][1])
    engine = RTX.build(graph, folder, key="k", recipe=load_recipe(gpu))
    assert engine.structure is not None
    assert engine.quantization is not None
    assert engine.quantization.fused == engine.quantization.quantized
    structure = json.loads((folder / engine.structure.path).read_text())
    assert structure["attention"] == {"layers": 2, "fused": 2, "types": ["bf16"]}
    assert structure["allocations"] == 0
    assert structure["products"].keys() == {"bf16"}
    assert structure["largest_buffer_bytes"] == image * 12288 * 2
    assert len(structure["kernels"]) <= 54
    assert planned == pytest.approx(engine.activation_bytes, rel=0.1)
    (folder / engine.path).unlink()


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_the_vae_stores_the_scores_of_one_row(
    full_width: Callable[..., tuple[GraphRecord, Path, int]], component: str
) -> None:
    """At the published width, for the largest image of the recipe; the scores of all rows take 2.9 GB."""
    graph, folder, _ = full_width(component)
    (dims,) = (p.max for p in graph.profiles)
    scale = {"vae_encoder": 1 / 8, "vae_decoder": 2}[component]
    positions = int(dims[1] * scale) * int(dims[2] * scale)
    for name in ("l40s", "a100"):
        engine = RTX.build(graph, folder, key="k", recipe=load_recipe(name))
        assert engine.structure is not None
        assert engine.activation_bytes is not None
        assert engine.activation_bytes < 2 * positions**2
        (folder / engine.path).unlink()
