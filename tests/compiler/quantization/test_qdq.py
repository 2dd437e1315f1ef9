"""Q/DQ graphs: what onnxruntime makes of them is what the quantizers say, and the rest of the graph is as it was."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.metrics.error import relative_l2
from qie.compiler.quantization.blockwise import Segment, Values, run
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.linears import excluded, linear_inputs, linear_nodes, linears
from qie.compiler.quantization.qdq import insert_qdq, quantize_by_recipe, quantize_linears
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.quantization.smoothing import smoothed_modulation, smoothed_reader, smoothing_groups
from qie.compiler.recipe.schema import ComponentRecipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.specs import RotarySpec
from qie.engines.errors import CalibrationError, RecipeError
from qie.engines.inputs.feeds import language_feed, transformer_feed
from qie.engines.inputs.prompt import PromptTokens


def inputs(graph: Graph, seed: int = 0) -> Values:
    """Inputs of the transformer or the language model, of plausible sizes and ranges."""
    rng = np.random.default_rng(seed)
    if graph.component == "language":
        tokens = PromptTokens(
            input_ids=rng.integers(0, 500, (1, 70)),
            image_index=np.where(np.arange(70) < 4, np.arange(70), -1)[None],
            position_ids=np.tile(np.arange(70), (3, 1, 1)),
            lengths=(70,),
        )
        return language_feed(tokens, rng.standard_normal((4, graph.inputs[1].dims[1])).astype(np.float32))
    sizes = {"batch": 1, "noise_tokens": 12, "reference_tokens": 8, "text_tokens": 5, "tokens": 25,
             "steps": 1, "steps_of_blocks": ARCHITECTURES["tiny"].num_layers}  # fmt: skip
    drawn = {spec.name: rng.standard_normal(spec.shape(sizes)).astype(np.float32) for spec in graph.inputs}
    return transformer_feed(
        latents_BNC=drawn["latents"],
        reference_BRC=drawn["reference"],
        prompt_BLD=drawn["prompt_embeds"],
        rotary=RotarySpec(axes_dims=ARCHITECTURES["tiny"].axes_dims_rope),
        grids=[(3, 4), (2, 4)],
        modulation_YM=drawn["modulation"] * np.float32(0.3),
        modulation_out_O=drawn["modulation_out"][0],
        dsigma=drawn["dsigma"][0],
    )


RESULT = {"transformer": "velocity", "language": "prompt_embeds"}


def result(graph: Graph, readers: dict[Any, TensorReader], values: Values) -> np.ndarray:
    samples = [dict(values)]
    run(graph, readers, samples, lambda *_: None)
    return samples[0][RESULT[graph.component]]


def calibration(graph: Graph, readers: dict[Any, TensorReader], values: Values, **fields: Any) -> Calibration:
    """From one sample."""
    amax = {name: np.abs(x).reshape(-1, x.shape[-1]).max(0) for name, x in seen(graph, readers, values).items()}
    return Calibration(model="m", name="tiny", data="d", samples=1, amax=amax, **fields)


def seen(graph: Graph, readers: dict[Any, TensorReader], values: Values) -> dict[str, np.ndarray]:
    """The input of every linear that may be quantized."""
    names = linears(graph)
    read = {name: value for name, value in linear_inputs(graph).items() if name in names}
    found: dict[str, np.ndarray] = {}

    def observe(piece: Segment, sample: int, here: Values) -> None:
        own = {weight.name.removesuffix(".weight") for weight in piece.weights}
        found.update({name: here[value].copy() for name, value in read.items() if name in own})

    watch = {f"{name}.weight": [value] for name, value in read.items()}
    run(graph, readers, [dict(values)], lambda *_: None, watch=watch, after_sample=observe)
    return found


@pytest.mark.parametrize("component", ["transformer", "language"])
@pytest.mark.parametrize("scheme", ["fp8", "int8-smooth", "w8a16", "w4a16"])
def test_onnxruntime_computes_what_the_quantizers_say(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], component: Component, scheme: Any
) -> None:
    """Every product of the quantized graph, against numpy: rounded inputs times rounded weights."""
    graph = GRAPHS[component](tiny_checkpoint.model, "float32")
    names = linears(graph)
    before = linear_inputs(graph)
    products = {name: node for node, _, weight in linear_nodes(graph) for name in names
                if weight.name == f"{name}.weight"}  # fmt: skip
    values = inputs(graph)
    known = calibration(GRAPHS[component](tiny_checkpoint.model, "float32"), readers, values)
    language = tiny_checkpoint.model.language
    graph = quantize_linears(graph, scheme, names, known, language).graph
    scaled = {str(node.inputs[1].name): node for node in graph.model.graph if node.op_type == "Mul"}
    made = {n: scaled.get(f"{n}.weight.scale", node).outputs[0].name for n, node in products.items()}
    assert len(scaled.keys() & {f"{n}.weight.scale" for n in names}) == len(names) * SCHEMES[scheme].scales_products
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def observe(piece: Segment, sample: int, here: Values) -> None:
        own = {weight.name.removesuffix(".weight") for weight in piece.weights if weight.scale_of is None}
        found.update({name: (here[before[name]].copy(), here[made[name]].copy()) for name in own.intersection(names)})

    watch = {f"{name}.weight": (before[name], made[name]) for name in names}
    run(graph, readers, [dict(values)], lambda *_: None, watch=watch, after_sample=observe)
    rules = SCHEMES[scheme]
    for name, (x, y) in found.items():
        weight = readers[graph.weights[0].subfolder].read(f"{name}.weight").astype(np.float32).T
        if rules.inputs is not None:
            x = rules.inputs.fake_quantize(x, rules.inputs.scale_from_amax(known.amax[name].max()))
        assert relative_l2(y, x @ rules.weights.fake_quantize(weight)) < 1e-5, name
    assert len(found) == len(names)


@pytest.mark.parametrize("component", ["transformer", "language"])
def test_smoothing_changes_nothing(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], component: Component
) -> None:
    """Weights, norms, modulation and the graph's own division together: the function is the same."""
    graph = GRAPHS[component](tiny_checkpoint.model, "float32")
    values = inputs(graph)
    exact = result(graph, readers, values)
    rng = np.random.default_rng(1)
    language = tiny_checkpoint.model.language
    smoothed = smoothing_groups(component, linears(graph), language)
    assert {name for group in smoothed for name in group.consumers} == set(linears(graph))
    part = graph.weights[0].subfolder
    sizes = {w.name: w.shape[0] for w in graph.weights}
    factors = {
        g.name: np.exp(rng.uniform(-1, 1, sizes[f"{g.consumers[0]}.weight"] // g.repeats)).astype(np.float32)
        for g in smoothed
    }
    explicit = {n: g.expand(factors[g.name]) for g in smoothed if not g.producers for n in g.consumers}
    graph = insert_qdq(GRAPHS[component](tiny_checkpoint.model, "float32"), SCHEMES["int8-smooth"], [], {}, explicit)
    changed = dict(values)
    if component == "transformer":
        changed["modulation"] = smoothed_modulation(values["modulation"], smoothed, factors)
    through = {**readers, part: smoothed_reader(readers[part], smoothed, factors)}
    assert relative_l2(result(graph, through, changed), exact) < 1e-5
    for number, group in enumerate(smoothed):
        if group.producers:
            half = [*smoothed[:number], replace(group, producers=()), *smoothed[number + 1 :]]
            through = {**readers, part: smoothed_reader(readers[part], half, factors)}
            rows = changed
            if component == "transformer":
                rows = {**values, "modulation": smoothed_modulation(values["modulation"], half, factors)}
            assert relative_l2(result(graph, through, rows), exact) > 1e-4, group.name


def test_smoothed_modulation_is_that_of_smoothed_weights(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader]
) -> None:
    from qie.compiler.weights.modulation import CheckpointModulation
    from qie.engines.inputs.modulation import compute_tables, split_tables

    graph = GRAPHS["transformer"](tiny_checkpoint.model, "float32")
    config = tiny_checkpoint.model.transformer
    smoothed = smoothing_groups("transformer", linears(graph))
    rng = np.random.default_rng(0)
    factors = {g.name: np.exp(rng.uniform(-1, 1, config.width)).astype(np.float32) for g in smoothed if g.producers}
    smoothed = tuple(g for g in smoothed if g.producers)
    tables = []
    for reader in (readers["transformer"], smoothed_reader(readers["transformer"], smoothed, factors)):
        flat = compute_tables(CheckpointModulation(config, reader), config, np.array([0.7, 0], np.float32))
        tables.append(split_tables(flat, config).blocks[0])
    np.testing.assert_allclose(smoothed_modulation(tables[0], smoothed, factors), tables[1], rtol=1e-4, atol=1e-4)
    assert relative_l2(tables[0], tables[1]) > 0.1


def test_smoothing_helps_where_channels_differ(tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader]) -> None:
    """A few channels a hundred times as large as the others ruin INT8 without smoothing, and not with it."""
    from qie.compiler.quantization.smoothing import smoothing_scales

    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 64)).astype(np.float32)
    x[:, [3, 17]] *= 100
    w = rng.standard_normal((64, 32)).astype(np.float32)
    scheme = SCHEMES["int8-smooth"]
    assert scheme.inputs is not None

    def error(factors: np.ndarray) -> float:
        made = scheme.inputs.fake_quantize(x / factors) @ scheme.weights.fake_quantize(w * factors[:, None])
        return relative_l2(made, x @ w)

    smooth = smoothing_scales(np.abs(x).max(0), np.abs(w).max(1), 0.5)
    assert error(smooth) < 0.3 * error(np.ones(64, np.float32))


def test_excluded_linears(tiny_checkpoint: Checkpoint) -> None:
    graph = GRAPHS["transformer"](tiny_checkpoint.model, "float32")
    names = linears(graph)
    blocks = sorted({name.split(".")[1] for name in names})
    last = f"transformer_blocks.{blocks[-1]}."
    assert excluded(graph, ["transformer_blocks.-1.*"]) == tuple(n for n in names if n.startswith(last))
    assert excluded(graph, ["*.to_q", "*.net.2"]) == tuple(n for n in names if n.endswith((".to_q", ".net.2")))
    assert not any("mod" in n or n in ("img_in", "txt_in", "proj_out") for n in names)
    with pytest.raises(
        RecipeError, match=r"exclude has \"\*\.to_x\", which matches no linear of this model; use names"
    ):
        excluded(graph, ["*.to_x"])


def test_what_was_measured_goes_before_the_recipe(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader]
) -> None:
    language = tiny_checkpoint.model.language

    def quantized(patterns: Sequence[str], **fields: Any) -> set[str]:
        graph = GRAPHS["transformer"](tiny_checkpoint.model, "float32")
        known = calibration(GRAPHS["transformer"](tiny_checkpoint.model, "float32"), readers, inputs(graph), **fields)
        section = ComponentRecipe(precision="float32", scheme="fp8", exclude=tuple(patterns))
        return set(quantize_by_recipe(graph, section, known, language).linears)

    names = set(linears(GRAPHS["transformer"](tiny_checkpoint.model, "float32")))
    one = sorted(names)[0]
    assert quantized([]) == names
    assert quantized(["*.to_q"]) == {n for n in names if not n.endswith(".to_q")}
    assert quantized(["*.to_q"], exclude={"transformer/fp8": [one]}) == names - {one}
    assert quantized(["*.to_q"], exclude={"transformer/int8-smooth": [one]}) == {n for n in names if "to_q" not in n}
    with pytest.raises(RecipeError, match="leaves none of the .* linears of this model to quantize; shorten it"):
        quantized(["*"])


def test_weights_take_a_half_or_a_quarter(tiny_checkpoint: Checkpoint) -> None:
    from qie.compiler.weights.weights_file import total_bytes

    graph = GRAPHS["transformer"](tiny_checkpoint.model, "bfloat16")
    names = linears(graph)
    codes = sum(np.prod(w.shape) for w in graph.weights if w.name.removesuffix(".weight") in names)
    plain = total_bytes(graph.weights)
    for scheme, size in (("fp8", 1), ("int8-smooth", 1), ("w4a16", 0.5)):
        made = insert_qdq(
            GRAPHS["transformer"](tiny_checkpoint.model, "bfloat16"),
            SCHEMES[scheme],
            names,
            dict.fromkeys(names, 1.0),
            {},
        )
        scales = sum(4 * np.prod(w.shape) for w in made.weights if w.scale_of)
        assert total_bytes(made.weights) <= plain - (2 - size) * codes + 4096 * len(names) + 64 * len(names) + scales
        assert made.parameters() == graph.parameters()


@pytest.mark.parametrize("attention", ["none", "fp8"])
def test_a_graph_is_not_changed(tiny_checkpoint: Checkpoint, attention: Any) -> None:
    graph = GRAPHS["transformer"](tiny_checkpoint.model, "float32")
    before = graph.digest()
    section = ComponentRecipe(precision="float32", scheme="int8-smooth", attention=attention)
    quantized = quantize_by_recipe(graph, section, None, tiny_checkpoint.model.language).graph
    assert graph.digest() == before != quantized.digest()


def test_a_linear_without_statistics(tiny_checkpoint: Checkpoint) -> None:
    graph = GRAPHS["transformer"](tiny_checkpoint.model, "float32")
    known = Calibration(model="m", name="tiny", data="d", samples=1, amax={}, source=Path("c.npz"))
    with pytest.raises(CalibrationError, match=r"c\.npz has no statistics of 'transformer_blocks\.0\..* more; make it"):
        quantize_linears(graph, "fp8", linears(graph), known, tiny_checkpoint.model.language)


@pytest.mark.parametrize("component", ["transformer", "language"])
def test_attention_in_fp8(tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], component: Component) -> None:
    """Queries, keys and values go through E4M3, and nothing else changes."""
    from qie.compiler.quantization.linears import attention_input_names, attention_inputs
    from qie.compiler.quantization.schemes import ATTENTION
    from qie.compiler.quantization.statistics import LinearStatistics

    language = tiny_checkpoint.model.language
    plain = GRAPHS[component](tiny_checkpoint.model, "float32")
    values = inputs(plain)
    exact = result(plain, readers, values)
    statistics = LinearStatistics(GRAPHS[component](tiny_checkpoint.model, "float32"), readers, 1, language)
    statistics.run([dict(values)], lambda *_: None)
    names = attention_inputs(plain)
    assert len(names) == 2
    amax = {name: statistics.found.amax[name] for attention in names for name in attention_input_names(attention)}
    known = Calibration(model="m", name="tiny", data="d", samples=1, amax=amax)
    section = ComponentRecipe(precision="float32", attention="fp8")
    graph = quantize_by_recipe(GRAPHS[component](tiny_checkpoint.model, "float32"), section, known, language).graph
    nodes = [node.op_type for node in graph.model.graph]
    assert nodes.count("QuantizeLinear") == nodes.count("DequantizeLinear") == 3 * len(names)
    assert graph.weights == plain.weights
    assert 1e-4 < relative_l2(result(graph, readers, values), exact) < 0.1
    assert ATTENTION.dtype == "float8_e4m3fn"
    with pytest.raises(CalibrationError, match="no statistics of .*query"):
        quantize_by_recipe(
            GRAPHS[component](tiny_checkpoint.model, "float32"), section, replace(known, amax={}), language
        )
