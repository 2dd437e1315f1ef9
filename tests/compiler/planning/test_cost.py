"""The cost of a graph: against hand counts, and against a run that is watched."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.graphs.graph import Graph
from qie.compiler.graphs.layers import loop
from qie.compiler.planning.cost import Cost, cost
from qie.compiler.synthetic.architecture import ARCHITECTURES, Shape, tensor_shapes
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS, Component, TensorSpec

TINY = ARCHITECTURES["tiny"]

B, N, R, L = 2, 24, 16, 10
P, V, S = 32, 8, 74
ROWS, COLUMNS = 4, 2
SIZES = {
    "batch": B, "noise_tokens": N, "reference_tokens": R, "text_tokens": L, "tokens": N + R + L,
    "steps": 1, "steps_of_blocks": TINY.num_layers,
    "patches": P, "image_tokens": V, "prompt_tokens": S,
    "rows": ROWS, "columns": COLUMNS, "height": 16 * ROWS, "width": 16 * COLUMNS,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", TINY, weights=False)
    return open_checkpoint(str(folder), weights=False).model


def counted(found: Cost) -> dict[str, int]:
    return {work.kind: work.flops for work in found.work}


# Operations


def test_the_transformer_against_a_hand_count(model: Model) -> None:
    d, layers, joint, channels = 64, TINY.num_layers, TINY.text_hidden_size, TINY.in_channels
    tokens = N + R + L
    block = 12 * d * d * tokens  # q, k, v, out and twice 4 d, for every token of both streams
    last = d * d * (N + 2 * tokens + N + 8 * N)  # keys and values of all, the rest of the noise alone
    ends = (N + R) * channels * d + L * joint * d + N * d * channels
    assert counted(cost(GRAPHS["transformer"](model, "bfloat16"), SIZES)) == {
        "gemm": 2 * B * ((layers - 1) * block + last + ends),
        "attention": 4 * B * d * tokens * ((layers - 1) * tokens + N),
    }


def test_the_language_model_against_a_hand_count(model: Model) -> None:
    d, inner = TINY.text_hidden_size, TINY.text_intermediate_size
    kv = d // TINY.text_heads * TINY.text_kv_heads
    assert counted(cost(GRAPHS["language"](model, "bfloat16"), SIZES)) == {
        "gemm": 2 * B * S * TINY.text_layers * (2 * d * d + 2 * d * kv + 3 * d * inner),
        "attention": 4 * B * S * S * d * TINY.text_layers,
    }


def test_the_vision_tower_against_a_hand_count(model: Model) -> None:
    d, inner, merged = TINY.vision_hidden_size, TINY.vision_intermediate_size, 4 * TINY.vision_hidden_size
    blocks = TINY.vision_depth * P * (4 * d * d + 3 * d * inner)
    ends = P * 3 * 2 * 14 * 14 * d + V * (merged * merged + merged * TINY.text_hidden_size)
    assert counted(cost(GRAPHS["vision"](model, "bfloat16"), SIZES)) == {
        "gemm": 2 * (blocks + ends),
        "attention": 4 * P * P * d * TINY.vision_depth,
    }


@pytest.mark.parametrize(("component", "side", "scale"), [("vae_encoder", 1, 1 / 4), ("vae_decoder", 1 / 8, 4)])
def test_the_vae_against_a_hand_count(model: Model, component: Component, side: float, scale: float) -> None:
    """Kernels in the order of the tensors; a resampling one works at the pixels that it makes."""
    pixels, latents = 16 * ROWS * 16 * COLUMNS, 2 * ROWS * 2 * COLUMNS
    outer = {"vae_encoder": "quant_conv", "vae_decoder": "post_quant_conv"}[component]
    area, operations = pixels * side**2, 0
    for name, shape in kernels(component.removeprefix("vae_")):
        area *= scale if ".resample." in name else 1
        operations += int(2 * B * area) * math.prod(shape)
    operations += 2 * B * latents * math.prod(tensor_shapes(TINY)["vae"][f"{outer}.weight"])
    width = TINY.vae_base_dim * TINY.vae_dim_mult[-1]
    assert counted(cost(GRAPHS[component](model, "bfloat16"), SIZES)) == {
        "convolution": operations,
        "attention": 4 * B * latents * latents * width,
    }


def kernels(half: str) -> list[tuple[str, Shape]]:
    """[out, in, height, width] of every 2-D convolution of one half of the VAE, in order."""
    return [
        (name, (*shape[:2], *shape[-2:]))
        for name, shape in tensor_shapes(TINY)["vae"].items()
        if name.startswith(f"{half}.") and name.endswith(".weight") and ".time_conv." not in name
    ]


def written(body: Any, inputs: Sequence[TensorSpec], outputs: int) -> Graph:
    specs = [TensorSpec(name=f"out_{i}", dtype="float32", dims=("n", "m")) for i in range(outputs)]
    return Graph.trace("vision", "text_encoder", "float32", body, inputs=inputs, outputs=specs)


def weight(op: Any, *shape: int) -> ir.Value:
    return op.initializer(ir.tensor(np.zeros(shape, np.float32)), name=f"weight_{shape}")


X_NK = TensorSpec(name="x", dtype="float32", dims=("n", 6))


def test_a_general_product_a_grouped_convolution_and_grouped_attention() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        return [op.Gemm(x, weight(op, 7, 5), transA=1)]

    turned = TensorSpec(name="x", dtype="float32", dims=(7, "n"))
    assert counted(cost(written(body, [turned], 1), {"n": 3})) == {"gemm": 2 * 3 * 7 * 5}

    def convolution(op: Any, x: ir.Value) -> list[ir.Value]:
        return [op.Conv(x, weight(op, 8, 2, 3, 3), group=2, pads=[1, 1, 1, 1])]

    image = TensorSpec(name="x", dtype="float32", dims=(1, 4, "n", 10))
    assert counted(cost(written(convolution, [image], 1), {"n": 9})) == {"convolution": 2 * 8 * 9 * 10 * 2 * 9}

    def attention(op: Any, q: ir.Value, kv: ir.Value) -> list[ir.Value]:
        return [op.Attention(q, kv, kv, q_num_heads=4, kv_num_heads=2)]

    pair = [
        TensorSpec(name="q", dtype="float32", dims=(1, "n", 32)),
        TensorSpec(name="kv", dtype="float32", dims=(1, 11, 16)),
    ]
    found = cost(written(attention, pair, 1), {"n": 5})
    assert counted(found) == {"attention": 4 * 5 * 11 * 32}
    assert found.moved_bytes == 4 * (5 * 32 + 2 * 11 * 16 + 5 * 32)


# Memory


def test_a_tensor_lives_until_its_last_reader_and_a_view_is_what_it_views() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        a = op.MatMul(x, weight(op, 6, 100))  # 400 bytes a row
        b = op.Reshape(a, [-1, 50])  # a view of a
        c = op.MatMul(b, weight(op, 50, 10))  # 80 bytes a row: a and c
        d = op.MatMul(c, weight(op, 10, 1000))  # 8,000: c and d, a is gone
        return [op.Sigmoid(d)]

    found = cost(written(body, [X_NK], 1), {"n": 2})
    assert found.activation_bytes == 2 * (80 + 8000)
    assert found.io_bytes == 2 * (24 + 8000)
    products = [(24, 2400, 400), (400, 2000, 80), (80, 40000, 8000)]
    assert found.moved_bytes == sum(2 * (x + y) + weight for x, weight, y in products)


def test_quantized_weights_are_read_as_they_are_stored() -> None:
    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        scale = op.initializer(ir.tensor(np.float32(0.5)), name="scale")
        weight = op.initializer(ir.tensor(np.ones((6, 10), np.int8)), name="weight")
        zero = op.initializer(ir.tensor(np.int8(0)), name="zero")
        return [
            op.MatMul(
                op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero),
                op.DequantizeLinear(weight, scale, zero),
            )
        ]

    found = cost(written(body, [X_NK], 1), {"n": 4})
    (work,) = found.work
    assert (work.kind, work.dtype, work.flops) == ("gemm", "int8", 2 * 4 * 6 * 10)
    assert found.moved_bytes == 4 * 6 + 60 + 4 * 4 * 10
    assert found.activation_bytes == 4 * 6  # the quantized input alone


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_activation_peak_is_that_of_a_watched_run(model: Model, component: Component) -> None:
    """onnxruntime's own arrays, as if made and freed one node at a time; the few bytes of shapes are among them."""
    graph = GRAPHS[component](model, "float32")
    model = graph.proto("", None)
    arrays = values_of(graph, model)
    ends = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    readers = [name for node in model.graph.node for name in node.input if name]
    holder: dict[str, str] = {}  # tensor -> tensor whose memory it uses
    held: dict[str, set[str]] = {}  # tensor with memory -> those of its tensors that are yet to be read
    peak = 0
    for node in model.graph.node:
        for name in filter(None, node.output):
            view = node.op_type in ("Reshape", "Squeeze", "Unsqueeze")
            holder[name] = holder.get(node.input[0], node.input[0]) if view else name
            if holder[name] not in ends:
                held.setdefault(holder[name], set()).add(name)
        peak = max(peak, sum(arrays[name].nbytes for name in held))
        for name in filter(None, node.input):
            readers.remove(name)
        held = {name: tensors & set(readers) for name, tensors in held.items() if tensors & set(readers)}
    assert cost(graph, SIZES, scores=False).activation_bytes == pytest.approx(peak, rel=0.01)


def values_of(graph: Graph, model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Every tensor of a run on zeros, but for those inside a loop."""
    full = onnx.ModelProto()
    full.CopyFrom(model)
    for tensor in full.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    ends = {value.name for value in full.graph.output}
    names = [name for node in full.graph.node for name in node.output if name and name not in ends]
    full.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(full.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {spec.name: np.zeros(spec.shape(SIZES), spec.dtype) for spec in graph.inputs}
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, map(np.asarray, session.run(outputs, feeds)), strict=True))


def test_no_attention_has_a_score_tensor_for_all_queries(model: Model) -> None:
    def peak(component: Component, tokens: int) -> int:
        sizes = SIZES | {"batch": 1, "noise_tokens": tokens, "tokens": tokens + R + L}
        sizes |= {"rows": tokens // 32, "columns": 32, "height": tokens // 2, "width": 512}
        return cost(GRAPHS[component](model, "bfloat16"), sizes).activation_bytes

    for component in ("transformer", "vae_encoder", "vae_decoder"):
        assert peak(component, 4096) < 2.1 * peak(component, 2048), component


def test_a_loop_costs_its_body_every_turn_and_holds_one_turn_at_a_time() -> None:
    """Rows of x [n, 6] against themselves, 4 bytes a number; y is alive around the loop and read inside."""

    def body(op: Any, x: ir.Value) -> list[ir.Value]:
        y = op.Sigmoid(x)  # 24 n bytes
        turned = op.Transpose(y, perm=[1, 0])  # 24 n
        rows = loop(
            op,
            op.Shape(x, start=0, end=1),
            lambda op, i: op.Relu(
                op.MatMul(op.Unsqueeze(op.Gather(y, i, axis=0), 0), turned)
            ),  # 24, then 4 n of [1, n]
            "float32",
        )  # [n, 1, n]: 4 n n
        return [op.MatMul(op.Squeeze(rows, 1), x)]

    n = 50
    found = cost(written(body, [X_NK], 1), {"n": n})
    assert counted(found) == {"attention": n * 2 * 6 * n + 2 * n * n * 6}
    assert found.moved_bytes == n * 4 * (6 + 6 * n + n) + 4 * (n * n + n * 6 + n * 6)
    around = 24 * n + 24 * n + 4 * n * n
    assert found.activation_bytes == around + 24 + 4 * n
