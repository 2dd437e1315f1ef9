"""Checkpoints of TensorRT-LLM made by hand from a small decoder, for tests of the reader: no code of qie's is used.

Sources: models/model_weights_loader.py (names: ``fc`` is gate_proj, ``gate`` is up_proj), models/qwen/convert.py (the
split over ranks), modelopt's export (``pack_int4_in_uint8``).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.trtllm.small import EPS, HEAD, INTERMEDIATE, LAYERS, SECTION, THETA, VOCABULARY, WIDTH, Small
from tests.support.trtllm.stored import Array, Floats, read_tensors, write_tensors

POSITIONS = 64
GROUP = 128


def config_of(small: Small, algorithm: str | None = None, tp: int = 1, **changes: Any) -> dict[str, Any]:
    quantization: dict[str, Any] = {"quant_algo": algorithm}
    if algorithm == "W4A16_AWQ":
        quantization |= {"group_size": GROUP, "has_zero_point": False, "pre_quant_scale": False}
    return {
        "architecture": "Qwen2VLForConditionalGeneration",
        "qwen_type": "qwen2_vl",
        "dtype": "float32",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": small.heads,
        "num_key_value_heads": small.kv_heads,
        "hidden_size": WIDTH,
        "head_size": HEAD,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "norm_epsilon": EPS,
        "position_embedding_type": "mrope",
        "rotary_embedding_dim": HEAD,
        "rotary_base": THETA,
        "rotary_scaling": {"type": "mrope", "mrope_section": list(SECTION)},
        "max_position_embeddings": POSITIONS,
        "seq_length": POSITIONS,
        "attn_bias": True,
        "mlp_bias": False,
        "mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1},
        "quantization": quantization,
        **changes,
    }


def write_by_hand(folder: Path, small: Small, algorithm: str | None = None, tp: int = 1, **changes: Any) -> Path:
    """A checkpoint of ``small``; ``changes`` are of config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(small, algorithm, tp, **changes)))
    for rank in range(tp):
        write_tensors(folder / f"rank{rank}.safetensors", dict(rank_tensors(small, algorithm, tp, rank)))
    return folder


def rewrite(folder: Path, change: Any, rank: int = 0) -> Path:
    """Change one rank's tensors: ``change`` gets the dict of them."""
    path = folder / f"rank{rank}.safetensors"
    tensors = dict(read_tensors(path))
    change(tensors)
    write_tensors(path, tensors)
    return folder


def rank_tensors(small: Small, algorithm: str | None, tp: int, rank: int) -> Iterator[tuple[str, Array]]:
    weights = small.weights
    yield "transformer.vocab_embedding.weight", weights["language_model.embed_tokens.weight"]
    yield "transformer.ln_f.weight", weights["language_model.norm.weight"]
    for layer in range(LAYERS):
        old, new = f"language_model.layers.{layer}.", f"transformer.layers.{layer}."
        yield new + "input_layernorm.weight", weights[old + "input_layernorm.weight"]
        yield new + "post_layernorm.weight", weights[old + "post_attention_layernorm.weight"]

        def part(name: str, axis: int, prefix: str = old) -> Floats:
            return np.split(weights[f"{prefix}{name}.weight"], tp, axis=axis)[rank]

        def of_heads(tensor: Floats, heads: int) -> Floats:
            by_head = tensor.reshape(heads, HEAD, *tensor.shape[1:])
            by_head = by_head.repeat(max(1, tp // heads), axis=0)
            return np.split(by_head, tp)[rank].reshape(-1, *tensor.shape[1:])

        heads = {"q": small.heads, "k": small.kv_heads, "v": small.kv_heads}
        qkv, bias = (
            np.concatenate([of_heads(weights[f"{old}self_attn.{x}_proj.{kind}"], n) for x, n in heads.items()])
            for kind in ("weight", "bias")
        )
        yield new + "attention.qkv.bias", bias
        for name, matrix, source in (
            ("attention.qkv", qkv, "self_attn.q_proj"),
            ("attention.dense", part("self_attn.o_proj", 1), "self_attn.o_proj"),
            ("mlp.fc", part("mlp.gate_proj", 0), "mlp.gate_proj"),
            ("mlp.gate", part("mlp.up_proj", 0), "mlp.up_proj"),
            ("mlp.proj", part("mlp.down_proj", 1), "mlp.down_proj"),
        ):
            for kind, tensor in linear(matrix, small.inputs[old + source], algorithm).items():
                yield f"{new}{name}.{kind}", tensor


def linear(matrix: Floats, amax: float, algorithm: str | None) -> dict[str, Array]:
    """The tensors of a linear [out, in] whose input's largest magnitude is ``amax``."""
    scalar = np.ones(1, np.float32)
    match algorithm:
        case "FP8":
            scale = np.abs(matrix).max() / np.float32(448)
            weight = (matrix / scale).astype(ml_dtypes.float8_e4m3fn)
            scales = {"activation_scaling_factor": scalar * amax / 448, "weights_scaling_factor": scalar * scale}
            return {"weight": weight, **{name: value.astype(np.float32) for name, value in scales.items()}}
        case "W8A8_SQ_PER_CHANNEL":
            scale = (np.abs(matrix).max(1) / 127).astype(np.float32)
            return {
                "weight": np.rint(matrix / scale[:, None]).astype(np.int8),
                "weights_scaling_factor": scale,
                "activation_scaling_factor": (scalar * amax / 127).astype(np.float32),
                "prequant_scaling_factor": np.ones(matrix.shape[1], np.float32),
            }
        case "W4A16_AWQ":
            groups = matrix.reshape(len(matrix), -1, GROUP)
            scale = (np.abs(groups).max(-1) / 7).astype(np.float32)
            steps = np.clip(np.rint(groups / scale[..., None]), -8, 7).astype(np.int8).reshape(matrix.shape)
            packed = (steps[::2] & 0x0F) | (steps[1::2] << 4)
            return {"weight": packed.astype(np.int8), "weights_scaling_factor": scale}
        case _:
            return {"weight": matrix}
