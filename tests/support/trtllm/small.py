"""A small Qwen2.5-VL decoder of transformers with random weights, a prompt with an image, and its hidden states.

``python -m tests.support.trtllm.small`` records what transformers computes, which takes seconds to import.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.trtllm.stored import Array, Floats

RECORDED = Path(__file__).with_name("small.npz")

SECTION = (4, 6, 6)
"""Pairs of a head of 32 that turn with the frame, the height and the width."""

HEAD, WIDTH, INTERMEDIATE, LAYERS, VOCABULARY, EPS, THETA = 32, 512, 1024, 2, 96, 1e-6, 1_000_000.0
"""Widths that four ranks can divide into groups of 128 inputs, which 4-bit weights share a scale in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Small:
    """The decoder and one prompt of S tokens.

    Attributes:
        weights: canonical name ("language_model.layers.0...") -> float32 tensor as transformers stores it.
        heads, kv_heads: of the attention.
        ids: int32 [S]; image tokens are VOCABULARY + row of ``image``.
        image: [V, WIDTH], the image embeddings.
        positions: int64 [3, S].
        expected: [S, WIDTH], transformers' last hidden states, float32.
        inputs: name of a linear -> largest magnitude of its input.
    """

    weights: dict[str, Floats]
    heads: int
    kv_heads: int
    ids: Array
    image: Floats
    positions: Array
    expected: Floats
    inputs: dict[str, float]

    def rotary(self, positions: int) -> Floats:
        """The mrope table [positions, HEAD / 2, 2] (cos, sin); rows behind the prompt are those of position 0.

        Source: transformers' Qwen2_5_VLRotaryEmbedding and ``apply_multimodal_rotary_pos_emb`` (frequencies, sections).
        """
        table = np.zeros((positions, HEAD // 2, 2), np.float32)
        frequency = 1.0 / THETA ** (np.arange(0, HEAD, 2, dtype=np.float32) / HEAD)
        padded = np.zeros((3, positions))
        padded[:, : len(self.ids)] = self.positions
        angles = padded[np.repeat(np.arange(3), SECTION)].T * frequency
        table[..., 0], table[..., 1] = np.cos(angles), np.sin(angles)
        return table


@cache
def prompt_of(heads: int = 16, kv_heads: int = 8, seed: int = 0) -> Small:
    """The decoder of ``seed`` with its prompt, not yet run: without hidden states, and with 8 for every input."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Floats:
        return generator.standard_normal(shape).astype(np.float32)

    weights = {"embed_tokens.weight": normal(VOCABULARY, WIDTH), "norm.weight": 1 + 0.3 * normal(WIDTH)}
    inputs = {}
    linears = {
        "self_attn.q_proj": (heads * HEAD, WIDTH),
        "self_attn.k_proj": (kv_heads * HEAD, WIDTH),
        "self_attn.v_proj": (kv_heads * HEAD, WIDTH),
        "self_attn.o_proj": (WIDTH, heads * HEAD),
        "mlp.gate_proj": (INTERMEDIATE, WIDTH),
        "mlp.up_proj": (INTERMEDIATE, WIDTH),
        "mlp.down_proj": (WIDTH, INTERMEDIATE),
    }
    for layer in (f"layers.{i}." for i in range(LAYERS)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = 1 + 0.3 * normal(WIDTH)
        for name, shape in linears.items():  # as spread as real ones, so that every part of a layer counts
            weights[f"{layer}{name}.weight"] = normal(*shape) * np.float32(shape[1] ** -0.5)
            inputs[f"language_model.{layer}{name}"] = 8.0
            if name[-6] in "qkv":
                weights[f"{layer}{name}.bias"] = 0.5 * normal(shape[0])
    before, rows, columns, after = 7, 3, 4, 9
    places = np.arange(rows * columns)
    image_positions = before + np.stack([0 * places, places // columns, places % columns])
    text = [np.tile(np.arange(n), (3, 1)) + start for n, start in ((before, 0), (after, before + max(rows, columns)))]
    words = [generator.integers(0, VOCABULARY, n) for n in (before, after)]
    return Small(
        weights={f"language_model.{name}": weight.astype(np.float32) for name, weight in weights.items()},
        heads=heads,
        kv_heads=kv_heads,
        ids=np.concatenate([words[0], VOCABULARY + places, words[1]]).astype(np.int32),
        image=normal(len(places), WIDTH),
        positions=np.concatenate([text[0], image_positions, text[1]], axis=1),
        expected=np.empty(0, np.float32),
        inputs=inputs,
    )


@cache
def recorded() -> Small:
    """``small()`` as it was recorded (tests/compiler/backends/tensorrt_llm/test_reader.py compares them)."""
    prompt = prompt_of()
    with np.load(RECORDED) as file:
        inputs = dict(zip(prompt.inputs, file["inputs"].tolist(), strict=True))
        return replace(prompt, expected=file["expected"], inputs=inputs)


@cache
def small(heads: int = 16, kv_heads: int = 8, seed: int = 0) -> Small:
    """``prompt_of`` with transformers' hidden states, and the largest inputs of its linears."""
    import torch
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    prompt = prompt_of(heads, kv_heads, seed)
    rope = {"rope_type": "default", "mrope_section": list(SECTION), "rope_theta": THETA}
    options: dict[str, Any] = {"attn_implementation": "eager"}
    config = Qwen2_5_VLTextConfig(
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        rms_norm_eps=EPS,
        rope_parameters=rope,
        use_sliding_window=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    model: Any = Qwen2_5_VLTextModel(config)
    model.eval().requires_grad_(False)
    prefix = "language_model."
    model.load_state_dict({k.removeprefix(prefix): torch.from_numpy(v) for k, v in prompt.weights.items()})
    inputs: dict[str, float] = {}

    def observe(name: str) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...]) -> None:
            inputs[name] = float(arguments[0].abs().max())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(observe(prefix + name))
    embedded = prompt.weights[f"{prefix}embed_tokens.weight"][np.where(prompt.ids < VOCABULARY, prompt.ids, 0)]
    embedded[prompt.ids >= VOCABULARY] = prompt.image
    hidden = model(
        inputs_embeds=torch.from_numpy(embedded)[None],
        position_ids=torch.from_numpy(prompt.positions)[:, None],
        use_cache=False,
    ).last_hidden_state[0]
    return replace(prompt, expected=hidden.numpy(), inputs=inputs)


if __name__ == "__main__":
    made = small()
    np.savez_compressed(RECORDED, expected=made.expected, inputs=[made.inputs[name] for name in prompt_of().inputs])
