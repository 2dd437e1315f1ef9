"""The independent reader of TensorRT-LLM's checkpoints against transformers, on checkpoints made by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.metrics.error import relative_l2
from tests.support.trtllm.by_hand import GROUP, POSITIONS, rewrite, write_by_hand
from tests.support.trtllm.checkpoint import open_decoder
from tests.support.trtllm.small import VOCABULARY, Small, prompt_of, small
from tests.support.trtllm.stored import Array, Floats

LAYER = "transformer.layers.0."
Tensors = dict[str, Array]


def run(folder: Path, prompt: Small) -> Floats:
    decoder = open_decoder(folder)
    return decoder(decoder.embed(prompt.ids, prompt.image), prompt.rotary(POSITIONS))


def distance(folder: Path, prompt: Small) -> float:
    return relative_l2(run(folder, prompt), prompt.expected)


def test_what_is_recorded_is_transformers(decoder: Small) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    computed = small()
    np.testing.assert_allclose(decoder.expected, computed.expected, atol=1e-4)
    assert decoder.inputs == pytest.approx(computed.inputs, rel=1e-4)


def test_float32_is_the_recorded(decoder: Small, tmp_path: Path) -> None:
    hidden = run(write_by_hand(tmp_path / "made", decoder), decoder)
    np.testing.assert_allclose(hidden, decoder.expected, atol=1e-4)
    assert np.abs(decoder.expected).max() > 1


@pytest.mark.parametrize("tp", [2, 4, 16])
def test_ranks_together_are_the_whole(decoder: Small, tmp_path: Path, tp: int) -> None:
    """With 16 ranks two of them share each of the 8 key heads."""
    hidden = run(write_by_hand(tmp_path / "made", decoder, tp=tp), decoder)
    np.testing.assert_allclose(hidden, decoder.expected, atol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "bound"), [("FP8", 0.1), ("W8A8_SQ_PER_CHANNEL", 0.05), ("W8A16", 0.02), ("W4A16_AWQ", 0.35)]
)
@pytest.mark.parametrize("tp", [1, 2])
def test_quantized_is_near_and_not_equal(decoder: Small, tmp_path: Path, algorithm: str, bound: float, tp: int) -> None:
    assert bound / 10 < distance(write_by_hand(tmp_path / "made", decoder, algorithm, tp), decoder) < bound


def test_int4_is_the_steps_times_their_groups_scale(decoder: Small, tmp_path: Path) -> None:
    """The same result as from float32 weights that are rounded to 4 bits before they are written."""
    rounded = dict(decoder.weights)
    for name, matrix in decoder.weights.items():
        if name.endswith("proj.weight"):
            groups = matrix.reshape(len(matrix), -1, GROUP)
            scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7)
            rounded[name] = (np.rint(groups / scale) * scale).reshape(matrix.shape)
    plain = run(write_by_hand(tmp_path / "plain", replace(decoder, weights=rounded)), decoder)
    packed = run(write_by_hand(tmp_path / "packed", decoder, "W4A16_AWQ"), decoder)
    assert relative_l2(packed, plain) < 1e-5


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for kind in ("weight", "weights_scaling_factor", "activation_scaling_factor"):
            if LAYER + f"{one}.{kind}" in tensors:
                pair = LAYER + f"{one}.{kind}", LAYER + f"{other}.{kind}"
                tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]

    return change


def swap_key_and_value(tensors: Tensors) -> None:
    for kind in ("weight", "bias"):
        q, k, v = np.split(tensors[f"{LAYER}attention.qkv.{kind}"], [512, 768])
        tensors[f"{LAYER}attention.qkv.{kind}"] = np.concatenate([q, v, k])


def no_bias(tensors: Tensors) -> None:
    tensors[f"{LAYER}attention.qkv.bias"] = 0 * tensors[f"{LAYER}attention.qkv.bias"]


@pytest.mark.parametrize("change", [swap("mlp.fc", "mlp.gate"), swap_key_and_value, no_bias])
def test_a_mistake_shows(decoder: Small, tmp_path: Path, change: Callable[[Tensors], None]) -> None:
    assert distance(rewrite(write_by_hand(tmp_path / "made", decoder), change), decoder) > 0.1


@pytest.mark.parametrize(
    ("algorithm", "scale"),
    [
        ("FP8", "attention.dense.weights_scaling_factor"),
        ("FP8", "mlp.proj.activation_scaling_factor"),
        ("W8A8_SQ_PER_CHANNEL", "mlp.fc.weights_scaling_factor"),
        ("W8A8_SQ_PER_CHANNEL", "mlp.proj.activation_scaling_factor"),
        ("W8A8_SQ_PER_CHANNEL", "attention.qkv.prequant_scaling_factor"),
        ("W4A16_AWQ", "attention.qkv.weights_scaling_factor"),
    ],
)
def test_a_wrong_scale_shows(decoder: Small, tmp_path: Path, algorithm: str, scale: str) -> None:
    made = write_by_hand(tmp_path / "made", decoder, algorithm)
    right = distance(made, decoder)
    factor = 1 / 16 if "activation" in scale else 2
    rewrite(made, lambda tensors: tensors.update({LAYER + scale: (tensors[LAYER + scale] * factor).astype("f4")}))
    assert distance(made, decoder) > 2 * right


def test_the_halves_of_a_byte_in_the_wrong_order_show(decoder: Small, tmp_path: Path) -> None:
    made = write_by_hand(tmp_path / "made", decoder, "W4A16_AWQ")

    def swap_halves(tensors: Tensors) -> None:
        stored = tensors[f"{LAYER}mlp.fc.weight"].view(np.uint8)
        tensors[f"{LAYER}mlp.fc.weight"] = (stored << 4 | stored >> 4).view(np.int8)

    right = distance(made, decoder)
    assert distance(rewrite(made, swap_halves), decoder) > 2 * right


def test_text_positions_for_an_image_show(decoder: Small, tmp_path: Path) -> None:
    loaded = open_decoder(write_by_hand(tmp_path / "made", decoder))
    rotary = decoder.rotary(POSITIONS)
    embedded = loaded.embed(decoder.ids, decoder.image)
    text = prompt_of().rotary(POSITIONS).copy()
    text[:, 4:] = text[:, 4:][:, ::-1]  # height and width exchanged
    assert relative_l2(loaded(embedded, text), loaded(embedded, rotary)) > 0.01


def test_what_loading_refuses(decoder: Small, tmp_path: Path) -> None:
    name = f"{LAYER}mlp.fc.weight"

    def refused(change: Callable[[Tensors], None], kind: str) -> str:
        made = rewrite(write_by_hand(tmp_path / kind, decoder), change)
        with pytest.raises(RuntimeError) as problem:
            open_decoder(made)
        return str(problem.value)

    assert refused(lambda t: t.pop(name), "missing") == f"Required but not provided tensors:{{'{name}'}}"
    extra = refused(lambda t: t.update({"lm_head.bias": np.zeros(1, np.float32)}), "extra")
    assert extra == "Provided but not required tensors: {'lm_head.bias'}"
    shape = refused(lambda t: t.update({name: t[name].T.copy()}), "shape")
    assert "Updated: (512, 1024), original: (1024, 512)' for parameter" in shape
    assert "set to float16" in refused(lambda t: t.update({name: t[name].astype(np.float16)}), "dtype")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"architecture": "Qwen2_5_VLForConditionalGeneration"}, KeyError),
        ({"quantization": {"quant_algo": None, "quantize_lm_head": False}}, TypeError),
        ({"mapping": {"world_size": 2, "tp_size": 1}}, ValueError),
        ({"qwen_type": "qwen2_5_vl"}, ValueError),
        ({"position_embedding_type": "rope_gpt_neox"}, ValueError),
    ],
)
def test_configs_that_are_refused(
    decoder: Small, tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_decoder(write_by_hand(tmp_path / "made", decoder, **change))


@pytest.mark.parametrize("key", ["seq_length", "qwen_type"])
def test_keys_that_the_model_reads_without_a_default(decoder: Small, tmp_path: Path, key: str) -> None:
    made = write_by_hand(tmp_path / "made", decoder)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    with pytest.raises(AttributeError, match=key):
        open_decoder(made)


def test_a_list_of_excluded_modules_replaces_the_default(decoder: Small, tmp_path: Path) -> None:
    """Without "*vocab_embedding" in it, weight-only quantization wants an int8 embedding."""
    quantization = {"quant_algo": "W8A16", "exclude_modules": ["*lm_head"]}
    with pytest.raises(RuntimeError, match="per_token_scale"):
        open_decoder(write_by_hand(tmp_path / "made", decoder, "W8A16", quantization=quantization))


def test_one_excluded_layer_is_not_quantized(decoder: Small, tmp_path: Path) -> None:
    excluded = ["*lm_head*", "*vocab_embedding*", "*layers.0.*", "*layers.1.*"]
    quantization = {"quant_algo": "W8A16", "exclude_modules": excluded}
    assert distance(write_by_hand(tmp_path / "made", decoder, "W8A16", quantization=quantization), decoder) < 1e-5


def test_ids_from_the_vocabularys_size_on_are_of_the_table(decoder: Small, tmp_path: Path) -> None:
    loaded = open_decoder(write_by_hand(tmp_path / "made", decoder))
    embedded = loaded.embed(np.array([3, VOCABULARY + 2]), decoder.image)
    assert np.array_equal(embedded[0], decoder.weights["language_model.embed_tokens.weight"][3])
    assert np.array_equal(embedded[1], decoder.image[2])
