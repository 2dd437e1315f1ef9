"""Quantized graphs whose scales, linears or smoothing are wrong, with gates as wide as those of GPU recipes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from tests.support.faults.code import Change
from tests.support.faults.fault import Fault
from tests.support.faults.graph import constant_of, graph_changed, weight_changed

__all__ = ["FAULTS"]

FP8, INT8 = "pocket in FP8", "pocket in INT8"


def constant_changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Replace the constant ``name`` of the transformer's graph by ``change`` of it."""

    def replace(graph: onnx.GraphProto) -> None:
        values = constant_of(graph, name)
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(values).astype(values.dtype), name))

    return graph_changed("transformer", replace)


def dequantized_otherwise(linear: str, factor: float) -> Callable[[Path], None]:
    """The input of ``linear`` is dequantized by another scale than it is quantized by."""

    def change(graph: onnx.GraphProto) -> None:
        name = f"{linear}.input_scale"
        scale = np.asarray(constant_of(graph, name) * factor, np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(scale, "other_scale"))
        nodes = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[1] == name]
        assert nodes
        for node in nodes:
            node.input[1] = "other_scale"

    return graph_changed("transformer", change)


def zero_point(linear: str) -> Callable[[Path], None]:
    """The input of ``linear`` is dequantized around 16 in place of 0."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(16, np.int8), "zero_point"))
        nodes = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[1] == f"{linear}.input_scale"]
        assert nodes
        for node in nodes:
            node.input.append("zero_point")

    return graph_changed("transformer", change)


def double_channel(scales: np.ndarray) -> None:
    scales[scales.argmax()] *= 2


QDQ = "compiler.quantization.qdq"
NAMES = "names = [name for name in linears(graph) if name not in exclude]"
B2 = "transformer_blocks.2"

FAULTS = {
    "scale of one channel": Fault(
        how="the largest of 192 weight scales of `to_q` of block 2 is twice as large (FP8)",
        bundle=FP8,
        breaks=weight_changed("transformer", f"{B2}.attn.to_q.weight.scale", double_channel),
    ),
    "scales of a weight": Fault(
        how="the weight scales of a linear of block 2 are twice as large (FP8)",
        bundle=FP8,
        breaks=weight_changed("transformer", f"{B2}.txt_mlp.net.2.weight.scale", lambda s: np.multiply(s, 2, out=s)),
    ),
    "input scale too large": Fault(
        how="the input scale of the image's queries, keys and values of block 3 is 4 times as large (INT8)",
        bundle=INT8,
        breaks=constant_changed("transformer_blocks.3.attn.to_k.input_scale", lambda s: 4 * s),
    ),
    "input scale too large in FP8": Fault(
        how="the input scale of the text's queries, keys and values of block 3 is 4 times as large (FP8)",
        bundle=FP8,
        breaks=constant_changed("transformer_blocks.3.attn.add_k_proj.input_scale", lambda s: 4 * s),
    ),
    "input scale too small": Fault(
        how="the input scale of a linear of block 1 is a quarter, which clips (FP8)",
        bundle=FP8,
        breaks=constant_changed("transformer_blocks.1.txt_mlp.net.0.proj.input_scale", lambda s: s / 4),
    ),
    "scale of one side": Fault(
        how="an input of block 2 is dequantized by twice the scale that it is quantized by (INT8)",
        bundle=INT8,
        breaks=dequantized_otherwise(f"{B2}.img_mlp.net.0.proj", 2.0),
    ),
    "zero point": Fault(
        how="an input of block 3 is dequantized around 16 in place of 0 (INT8)",
        bundle=INT8,
        breaks=zero_point("transformer_blocks.3.img_mlp.net.0.proj"),
    ),
    "smoothing twice": Fault(
        how="the input of a linear of block 2 is divided by the smoothing scales twice (INT8)",
        bundle=INT8,
        breaks=constant_changed(f"{B2}.img_mlp.net.2.inverse_factors", np.square),
    ),
    "smoothing of weights alone": Fault(
        how="the weights of a linear of block 2 are smoothed, its input is not (INT8)",
        bundle=INT8,
        breaks=constant_changed(f"{B2}.img_mlp.net.2.inverse_factors", np.ones_like),
    ),
    "smoothing of weights without their inputs": Fault(
        how="weights are smoothed, and modulation and values in front of them are not (INT8)",
        bundle=INT8,
        writes=Change(
            module="compiler.quantization.smoothing",
            old="            folds.setdefault(tensor, []).append((fold, values))",
            new="            pass",
        ),
    ),
    "channels of quantized values": Fault(
        how="the quantized values of a linear of block 2 are one output channel further (INT8)",
        bundle=INT8,
        breaks=weight_changed("transformer", f"{B2}.attn.to_k.weight", lambda w: _roll(w)),
    ),
    "excluded linear quantized": Fault(
        how="a linear that the calibration excludes is quantized (FP8)",
        bundle=FP8,
        writes=Change(module=QDQ, old=NAMES, new=NAMES.replace("exclude]", "exclude[1:]]")),
    ),
    "linear not quantized": Fault(
        how="a linear that the recipe quantizes is not (FP8)",
        bundle=FP8,
        writes=Change(module=QDQ, old=NAMES, new=f"{NAMES}[1:]"),
    ),
}


def _roll(weight: np.ndarray) -> None:
    weight[:] = np.roll(weight, 1, axis=1)
