"""A checkpoint of TensorRT-LLM: config.json and rank0.safetensors, ...: checked as loading does, and executable.

    decoder = open_decoder(folder)
    hidden = decoder(decoder.embed(ids, table), rotary)

Sources: ``from_checkpoint`` of models/modeling_utils.py, and those of the files beside this one.
"""

from pathlib import Path

import numpy as np

from tests.support.trtllm.config import Config, read_config
from tests.support.trtllm.decoder import Decoder, Layer, make_linear
from tests.support.trtllm.parameters import load
from tests.support.trtllm.stored import Array, Floats, read_tensors

LINEARS = {
    "qkv": "attention.qkv",
    "dense": "attention.dense",
    "fc": "mlp.fc",
    "gate": "mlp.gate",
    "proj": "mlp.proj",
}


def open_decoder(folder: Path, *, strict: bool = True) -> Decoder:
    """The decoder of the checkpoint in ``folder``.

    Args:
        folder: the checkpoint.
        strict: whether tensors that nothing needs, and other dtypes, are errors.

    Raises:
        KeyError, TypeError, AttributeError, AssertionError, RuntimeError: as TensorRT-LLM does.
        ValueError: what TensorRT-LLM can load, but is no Qwen2.5-VL decoder as an encoder, or ranks that differ in
            what all of them hold.
    """
    config = read_config(folder)
    ranks = []
    for rank in range(config.tp):
        path = folder / f"rank{rank}.safetensors"
        assert path.is_file(), path
        ranks.append(load(read_tensors(path), config, strict=strict))
    if len(list(folder.glob("rank*.safetensors"))) != config.tp:
        raise ValueError(f"{folder} has files of more ranks than tp_size = {config.tp}")
    return make_decoder(config, ranks)


def make_decoder(config: Config, ranks: list[dict[str, Array]]) -> Decoder:
    """The decoder of the loaded parameters of every rank."""

    def shared(name: str) -> Array:
        if any(not np.array_equal(rank[name], ranks[0][name]) for rank in ranks):
            raise ValueError(f"{name} differs between ranks")
        return ranks[0][name]

    def norm(name: str) -> Floats:
        return shared(f"transformer.{name}.weight").astype(np.float32)

    return Decoder(
        config=config,
        embedding=shared("transformer.vocab_embedding.weight"),
        layers=[
            Layer(
                input_norm=norm(f"layers.{i}.input_layernorm"),
                post_norm=norm(f"layers.{i}.post_layernorm"),
                **{
                    key: [make_linear(f"transformer.layers.{i}.{name}", rank, config) for rank in ranks]
                    for key, name in LINEARS.items()
                },
            )
            for i in range(config.layers)
        ],
        norm=norm("ln_f"),
    )
