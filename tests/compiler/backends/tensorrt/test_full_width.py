"""Engines of layers of the published width, compiled by TensorRT for RTX."""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.graphs.components import write_graph_of
from qie.compiler.graphs.graph import write_graph
from qie.compiler.planning.profiles import profiles
from qie.compiler.quantization.linears import linear_inputs, linears
from qie.compiler.quantization.qdq import insert_qdq
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.load import load_recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Weight
from qie.engines.bundle.manifest import FileRecord, GraphRecord, QuantizationRecord

pytest.importorskip("tensorrt_rtx")

RTX = BUILDERS["tensorrt-rtx"]

LAYERS = {"transformer": 2, "vision": 2, "language": 1}


class RandomReader:
    """Random weights in the checkpoint's shapes; the compiler would fold zeros."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self._weights = {weight.name: weight for weight in weights}

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights[name]
        if "last_frame" in weight.layout:
            return (*weight.shape[:2], 1, *weight.shape[2:])
        return weight.shape[::-1] if "transpose" in weight.layout else weight.shape

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read(self, name: str) -> Any:
        """Of either sign, from 1/128 to 1/64."""
        shape = self.shape(name)
        bits = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**16, shape, np.uint16)
        return ((bits & 0x807F) | 0x3C00).view(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[GraphRecord, Path]]:
    """A component of the published 2511 with the layers of LAYERS; the transformer has 24 heads of 128.

    With a scheme, all its linears are quantized.
    """
    architecture = replace(
        ARCHITECTURES["qwen-image-edit-2511"],
        num_layers=LAYERS["transformer"],
        text_layers=LAYERS["language"],
        text_vocab_size=2048,
        vision_depth=LAYERS["vision"],
        vision_fullatt_block_indexes=(1,),
    )
    folder = tmp_path_factory.mktemp("full")
    checkpoint = open_checkpoint(str(write_checkpoint(folder / "c", architecture, weights=False)), weights=False)
    recipe = load_recipe("l40s")

    def make(component: Any, scheme: Any = None) -> tuple[GraphRecord, Path]:
        graph, record = write_graph_of(component, checkpoint.model, recipe), None
        reader = RandomReader(graph.weights)
        if scheme is not None:
            names, total = linears(graph), len(linear_inputs(graph))
            graph = insert_qdq(graph, SCHEMES[scheme], names, dict.fromkeys(names, 4.0), {})
            record = QuantizationRecord(scheme=scheme, quantized=len(names), linears=total)
        written = write_weights(
            graph.weights, {weight.subfolder: reader for weight in graph.weights}, folder / "weights"
        )
        write_graph(graph, folder / "graph.onnx", "weights", {e.name: (e.offset, e.length) for e in written.entries})
        graph_record = GraphRecord(
            component=component,
            backend="tensorrt-rtx",
            precision=graph.dtype,
            key="0" * 64,
            path="graph.onnx",
            files=(FileRecord(path="weights", bytes=written.bytes, sha256=written.sha256),),
            inputs=graph.inputs,
            outputs=graph.outputs,
            parameters=graph.parameters(),
            profiles=profiles(graph, recipe, checkpoint.model),
            quantization=record,
        )
        return graph_record, folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("component", LAYERS)
def test_attention_at_full_width(full_width: Callable[..., tuple[GraphRecord, Path]], component: str) -> None:
    graph, folder = full_width(component)
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
@pytest.mark.parametrize(("scheme", "gpu"), [("fp8", "l40s"), ("int8-smooth", "a100-int8")])
def test_quantized_products_are_bfloat16(
    full_width: Callable[..., tuple[GraphRecord, Path]], scheme: str, gpu: str
) -> None:
    """The largest tensor is the feed-forward's, 12,288 channels of the image stream in bfloat16."""
    graph, folder = full_width("transformer", scheme)
    tokens = {p.input: p.max for p in graph.profiles}
    batch, noise, _ = tokens["latents"]
    image = batch * (noise + tokens["reference"][1])
    engine = RTX.build(graph, folder, key="k", recipe=load_recipe(gpu))
    assert engine.structure is not None
    assert engine.quantization is not None
    assert engine.quantization.fused == engine.quantization.quantized
    structure = json.loads((folder / engine.structure.path).read_text())
    assert structure["products"].keys() == {"bf16"}
    assert structure["largest_buffer_bytes"] == image * 12288 * 2
    assert len(structure["kernels"]) <= 54
    (folder / engine.path).unlink()


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_the_vae_stores_the_scores_of_one_row(
    full_width: Callable[..., tuple[GraphRecord, Path]], component: str
) -> None:
    """At the published width, for the largest image of the recipe; the scores of all rows take 2.9 GB."""
    graph, folder = full_width(component)
    (dims,) = (p.max for p in graph.profiles)
    scale = {"vae_encoder": 1 / 8, "vae_decoder": 2}[component]
    positions = int(dims[1] * scale) * int(dims[2] * scale)
    for name in ("l40s", "a100"):
        engine = RTX.build(graph, folder, key="k", recipe=load_recipe(name))
        assert engine.structure is not None
        assert engine.activation_bytes is not None
        assert engine.activation_bytes < 2 * positions**2
        (folder / engine.path).unlink()
