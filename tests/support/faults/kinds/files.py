"""Files of a bundle that are damaged, missing, of another bundle, or not what their record says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from safetensors.numpy import load_file

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.file import GOLDEN_FILE, open_golden, write_golden
from qie.compiler.validation.golden.records import GoldenRecord
from qie.engines.bundle.manifest import LoraRecord
from tests.support.damage import cut, flip
from tests.support.faults.fault import Fault
from tests.support.faults.graph import graph_changed
from tests.support.faults.sealing import assign, changing, reseal

__all__ = ["FAULTS"]


def other_golden(change: Callable[[GoldenRecord], GoldenRecord]) -> Callable[[Path], Path]:
    """The model's golden file with another description."""

    def golden(folder: Path) -> Path:
        path = folder / GOLDEN_FILE
        write_golden(change(open_golden(POCKET / GOLDEN_FILE).record), load_file(POCKET / GOLDEN_FILE), path)
        return path

    return golden


def swap_tokens(bundle: Path) -> None:
    """Two ordinary tokens of the vocabulary in each other's place, as in the tokenizer of another model."""
    path = bundle / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(data), encoding="utf-8")
    reseal(bundle)


def half_precision(graph: onnx.GraphProto) -> None:
    """A linear that is computed in float16, between two casts."""
    (product,) = (
        n for n in graph.node if n.op_type == "MatMul" and "transformer_blocks.2.img_mlp.net.2.weight" in n.input
    )
    place, wide, output = list(graph.node).index(product), list(product.input), product.output[0]
    casts = [
        onnx.helper.make_node("Cast", [name], [f"{name}.half"], name=f"half {k}", to=onnx.TensorProto.FLOAT16)
        for k, name in enumerate(wide)
    ]
    back = onnx.helper.make_node("Cast", [f"{output}.half"], [output], name="back", to=onnx.TensorProto.FLOAT)
    product.input[:], product.output[:] = [f"{name}.half" for name in wide], [f"{output}.half"]
    graph.node.insert(place + 1, back)
    for cast in casts:
        graph.node.insert(place, cast)


def rename_dim(graph: onnx.GraphProto) -> None:
    """An input whose free dim has another name."""
    graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"


LORA = LoraRecord(name="lora.safetensors", sha256="0" * 64, weight=1.0)

FAULTS = {
    "flipped byte of weights": Fault(
        how="a byte in the middle of transformer.weights",
        level="structure",
        breaks=lambda bundle: flip(bundle / "transformer.weights"),
    ),
    "missing file": Fault(
        how="vision.weights is deleted",
        level="structure",
        breaks=lambda bundle: (bundle / "vision.weights").unlink(),
    ),
    "truncated file": Fault(
        how="the second half of vae_decoder.weights is missing",
        level="structure",
        breaks=lambda bundle: cut(bundle / "vae_decoder.weights"),
    ),
    "edited manifest": Fault(
        how="a constant is edited by hand, and the seal stays",
        level="structure",
        breaks=lambda bundle: _replace(bundle / "manifest.json", '"max_shift": 0.9', '"max_shift": 0.8'),
    ),
    "engine for another GPU": Fault(
        how="the record of an engine has another compute capability",
        level="structure",
        breaks=changing("transformer", compute_capability="8.9"),
    ),
    "engine of another backend": Fault(
        how="the record of an engine has a backend that the recipe does not list",
        level="structure",
        breaks=changing("language", backend="tensorrt"),
    ),
    "engine in another precision": Fault(
        how="the record of an engine says bfloat16, the recipe float32",
        level="structure",
        breaks=changing("vae_decoder", precision="bfloat16"),
    ),
    "engine of another scheme": Fault(
        how="the record of an engine says fp8, the recipe none",
        level="structure",
        breaks=changing("transformer", quantization={"scheme": "fp8", "quantized": 10, "linears": 70, "fused": None}),
    ),
    "stale golden file": Fault(
        how="the golden file was recorded from an earlier checkpoint",
        golden=other_golden(lambda record: replace(record, digest="0" * 64)),
    ),
    "golden file with a LoRA": Fault(
        how="the golden file was recorded with a LoRA, which the bundle does not have",
        golden=other_golden(lambda record: replace(record, loras=(LORA,))),
    ),
    "golden file without the LoRA": Fault(
        how="the manifest lists a LoRA at half weight, which the golden file does not have",
        breaks=assign(loras=[{"name": "lora.safetensors", "sha256": "0" * 64, "weight": 0.5}]),
    ),
    "layer in float16": Fault(
        how="a linear of block 2 is computed in float16 between two casts",
        level="structure",
        breaks=graph_changed("transformer", half_precision),
    ),
    "contract of another graph": Fault(
        how="an input of the graph has another free dim than the manifest says",
        level="structure",
        breaks=graph_changed("transformer", rename_dim),
    ),
    "tokenizer of another model": Fault(
        how="two tokens of the vocabulary have each other's id",
        breaks=swap_tokens,
    ),
}


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")
