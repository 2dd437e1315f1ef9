"""The graphs of the pocket model compute what its golden file holds of every module, at the same places."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.metrics.error import relative_l2
from qie.compiler.packing.export import export_graphs
from qie.compiler.planning.resolve import plan_build
from qie.compiler.validation.golden.file import Golden
from qie.compiler.validation.golden.modules import TEXT, graph_modules
from qie.compiler.validation.golden.places import sample_places
from qie.compiler.weights.modulation import CheckpointModulation
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.inputs.feeds import (
    Feed,
    decoder_feed,
    encoder_feed,
    language_feed,
    transformer_feed,
    vision_feed,
)
from qie.engines.inputs.modulation import compute_tables, split_tables
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.vision import vision_inputs

BOUND = 1e-4
"""Relative L2 error of a module's samples in float32."""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "pocket"
    export_graphs(plan_build("pocket", out=folder), weights=True)
    return folder


@pytest.fixture(scope="module")
def feeds(pocket_golden: Golden) -> dict[Component, Feed]:
    """What each graph reads in the first case."""
    checkpoint, case = open_checkpoint("pocket"), pocket_golden.cases[0]
    model, record = checkpoint.model, case.record
    images = vision_inputs([prepare(image, model.areas).vision for image in case.images], model.processor)
    tokens = encode(load_tokenizer(checkpoint.path), [record.instruction], images.grids, model.prompt)
    step = next(modules.step for modules in pocket_golden.record.modules if modules.component == "transformer")
    modulation = CheckpointModulation(model.transformer, checkpoint.readers()["transformer"])
    tables = split_tables(
        compute_tables(modulation, model.transformer, np.array([case.sigmas[step], 0], np.float32)), model.transformer
    )
    sizes = [(record.height, record.width), *(image.shape[:2] for image in case.reference_images)]
    grids = [(height // 16, width // 16) for height, width in sizes]
    return {
        "vision": vision_feed(images),
        "language": language_feed(tokens, case.image_embeds),
        "vae_encoder": encoder_feed(case.reference_images[0]),
        "transformer": transformer_feed(
            latents_BNC=case.latents[record.recorded.index(step)][None],
            reference_BRC=np.concatenate(case.reference_latents)[None],
            prompt_BLD=case.prompt_embeds[None],
            rotary=model.rotary,
            grids=grids,
            modulation_YM=tables.blocks[0],
            modulation_out_O=tables.out[0],
            dsigma=-0.1,
        ),
        "vae_decoder": decoder_feed(case.final_latents.reshape(*grids[0], -1)),
    }


def values_of(proto: onnx.ModelProto) -> dict[str, str]:
    """The value that each module of a graph computes last, and of a transformer block that of each stream."""
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.onnxscript.name_scopes", "[]")
        nodes.setdefault(".".join(filter(None, ast.literal_eval(scopes))), []).append(node)
    values = {name: of_module[-1].output[0] for name, of_module in nodes.items()}
    for name in [name for name in nodes if f"{name}.txt_mlp.net.2" in nodes]:
        *_, image, _, text = (node.output[0] for node in nodes[name] if node.op_type == "Add")  # a norm between
        values |= {name: image, name + TEXT: text}
    return values


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_computes_what_was_sampled(
    component: Component, graphs: Path, feeds: dict[Component, Feed], pocket_golden: Golden
) -> None:
    (record,) = (modules for modules in pocket_golden.record.modules if modules.component == component)
    path = graphs / f"{component}.onnx"
    proto = onnx.load(path, load_external_data=False)
    values = {name: value for name, value in values_of(proto).items() if name in record.names}
    assert values.keys() == set(record.names)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=value) for value in sorted({*values.values()} - known))
    (path.with_name(f"{component}.all.onnx")).write_bytes(proto.SerializeToString())
    session = ort.InferenceSession(str(path.with_name(f"{component}.all.onnx")), providers=["CPUExecutionProvider"])
    feed: Any = {given.name: feeds[component][given.name] for given in session.get_inputs()}
    outputs = dict(zip(values, session.run(list(values.values()), feed), strict=True))
    for name, shape in zip(record.names, record.shapes, strict=True):
        output = np.asarray(outputs[name], np.float32)
        vae = component.startswith("vae")
        rows = output[0].reshape(output.shape[1], -1).T if vae else output.reshape(-1, output.shape[-1])
        places = sample_places(shape)
        computed = places[:, 0] < len(rows)
        assert rows.shape[1] == shape[1] and computed.mean() > 0.4, name
        found, expected = rows[tuple(places[computed].T)], pocket_golden.modules[component][name][computed]
        assert expected.std() > 0, name
        assert relative_l2(found, expected) < BOUND, name


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_module_with_weights_was_sampled(component: Component, pocket_golden: Golden) -> None:
    """All but the norms of heads, which the graph computes for text and image at once."""
    model = open_checkpoint("pocket", weights=False).model
    weights = {weight.name.rpartition(".")[0] for weight in GRAPHS[component](model, "float32").weights}
    sampled = pocket_golden.modules[component].keys()
    left_out = {name for name in weights - sampled if ".attn.norm_" not in name}
    assert left_out == set()
    (record,) = (modules for modules in pocket_golden.record.modules if modules.component == component)
    assert {name.removesuffix(TEXT) for name in record.names} <= graph_modules(model, component)


def test_blocks_are_whole(pocket_golden: Golden) -> None:
    blocks = {modules.component: modules.blocks for modules in pocket_golden.record.modules}
    assert blocks["vision"] == ("visual.blocks.0", "visual.blocks.1")
    assert blocks["language"] == tuple(f"language_model.layers.{number}" for number in range(3))
    both = tuple(f"transformer_blocks.{number}{stream}" for number in range(4) for stream in (TEXT, ""))
    assert blocks["transformer"] == (*both, "transformer_blocks.4")
    assert "encoder.mid_block.attentions.0" in blocks["vae_encoder"]
    assert "decoder.up_blocks.3.resnets.2" in blocks["vae_decoder"]
