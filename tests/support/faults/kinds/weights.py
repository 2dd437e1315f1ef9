"""Weights and modulation tables that are wrong, under a manifest that is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.modulation_rows import block_slice
from tests.support.faults.fault import Fault
from tests.support.faults.graph import exchange, graph_changed, weight_changed, weights_changed
from tests.support.faults.sealing import reseal

__all__ = ["FAULTS"]

Array = NDArray[Any]


def linear(name: str, how: str, change: Callable[[Array], object], *, tensor: str = "weight") -> Fault:
    """A linear of the transformer that is wrong."""
    return Fault(how=how, breaks=weight_changed("transformer", f"{name}.{tensor}", change))


def double_channel(weight: Array) -> None:
    weight[:, weight.shape[1] // 2] *= 2


def zero(weight: Array) -> None:
    weight[:] = 0


def transpose(weight: Array) -> None:
    weight[:] = weight.T.copy()


def add_low_rank(weight: Array) -> None:
    """What a LoRA of rank 4 at weight 0.5 adds."""
    generator = np.random.default_rng(4)
    up, down = (generator.standard_normal(shape) for shape in ((weight.shape[0], 4), (4, weight.shape[1])))
    weight += (0.5 * 0.01 * up @ down).astype(weight.dtype)


def round_to_fp8(weight: Array) -> None:
    weight[:] = weight.astype(ml_dtypes.float8_e4m3fn)


def exchange_heads(weight: Array) -> None:
    """Two key and value heads of the language model in each other's place."""
    weight[:] = np.roll(weight, weight.shape[-1] // 2, axis=-1)


def blocks_exchanged(one: int, other: int, names: tuple[str, ...]) -> Callable[[Path], None]:
    """All weights of two blocks of the transformer in each other's place."""
    pairs = [
        tuple(f"transformer_blocks.{number}.{name}.{tensor}" for number in (one, other))
        for name in names
        for tensor in ("weight", "bias")
    ]
    return graph_changed("transformer", exchange(*pairs))  # type: ignore[arg-type]


LINEARS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *("attn.to_out.0", "attn.to_add_out"),
    *(f"{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")),
)


def tables_changed(change: Callable[[Array, Any], object]) -> Callable[[Path], None]:
    """Apply ``change`` to every stored table [S, values] of modulation, with the manifest's record of it."""

    def breaks(bundle: Path) -> None:
        manifest = open_bundle(bundle).manifest
        for file in manifest.schedules:
            table = np.load(bundle / file.path)
            change(table, manifest.model.modulation)
            np.save(bundle / file.path, table, allow_pickle=False)
        reseal(bundle)

    return breaks


def next_step(table: Array, _: Any) -> None:
    table[:] = np.roll(table, -1, axis=0)


def exchange_rows(table: Array, record: Any) -> None:
    """Shift and scale of the noise's attention in block 3."""
    start = 3 * 18 * record.width
    places = [
        slice(start + row.start, start + row.stop)
        for row in (
            block_slice("noise", "attention", kind, record.width, references=True) for kind in ("shift", "scale")
        )
    ]
    table[:, places[0]], table[:, places[1]] = table[:, places[1]].copy(), table[:, places[0]].copy()


def scale_without_one(table: Array, record: Any) -> None:
    table[:, -2 * record.width : -record.width] -= 1


def double_modulation(bundle: Path) -> None:
    """A tensor of the modulation weights is doubled; no table belongs to it any more, so they are computed."""
    record = open_bundle(bundle).manifest.model.modulation
    (tensor,) = (tensor for tensor in record.tensors if tensor.name == "transformer_blocks.1.txt_mod.1.weight")
    mapped = np.memmap(bundle / record.file.path, np.float32, "r+", tensor.offset, tensor.shape)
    mapped *= 2
    mapped.flush()
    reseal(bundle, lambda data: data["model"]["modulation"].update(digest=None))  # the digest of the file stands for it


FAULTS = {
    "queries and keys exchanged": Fault(
        how="`to_q` and `to_k` of block 2 are in each other's place",
        breaks=graph_changed(
            "transformer",
            exchange(
                *(
                    (f"transformer_blocks.2.attn.to_q.{tensor}", f"transformer_blocks.2.attn.to_k.{tensor}")
                    for tensor in ("weight", "bias")
                )
            ),
        ),
    ),
    "norms of queries and keys exchanged": Fault(
        how="`norm_q` and `norm_k` of block 1 are in each other's place",
        breaks=weights_changed(
            "transformer",
            [f"transformer_blocks.1.attn.norm_{side}.weight" for side in "qk"],
            lambda one, other: _exchange(one, other),
        ),
    ),
    "two blocks exchanged": Fault(
        how="the linears of blocks 1 and 2 are in each other's place",
        breaks=blocks_exchanged(1, 2, LINEARS),
    ),
    "missing bias": linear(
        "transformer_blocks.3.img_mlp.net.2", "the bias of a linear of block 3 is 0", zero, tensor="bias"
    ),
    "channel of a weight doubled": linear(
        "transformer_blocks.2.attn.to_v", "one channel of 192 of `to_v` of block 2 is twice as large", double_channel
    ),
    "one weight of 36,864": linear(
        "transformer_blocks.0.attn.to_q", "one number of `to_q` of block 0 is 1 larger", lambda w: _one_larger(w)
    ),
    "weight not transposed": linear(
        "transformer_blocks.4.attn.to_out.0", "a square weight of the last block is [out, in]", transpose
    ),
    "foreign LoRA": linear(
        "transformer_blocks.2.attn.to_out.0",
        "a LoRA at half weight is fused into a linear of block 2, and the manifest lists none",
        add_low_rank,
    ),
    "weights rounded to FP8": linear(
        "transformer_blocks.1.img_mlp.net.0.proj",
        "a weight of block 1 went through FP8, and is float32 again",
        round_to_fp8,
    ),
    "text feed-forward missing": linear(
        "transformer_blocks.0.txt_mlp.net.2", "the last weight of the text's feed-forward of block 0 is 0", zero
    ),
    "key and value heads exchanged": Fault(
        how="the two key and value heads of layer 1 of the language model are in each other's place",
        breaks=weights_changed(
            "language",
            [f"language_model.layers.1.self_attn.{s}_proj.{t}" for s in "kv" for t in ("weight", "bias")],
            lambda *weights: [exchange_heads(weight) for weight in weights],
        ),
    ),
    "embedding of another token": Fault(
        how="the rows of two tokens of the embedding are in each other's place",
        breaks=weight_changed("language", "language_model.embed_tokens.weight", lambda w: _exchange(w[783], w[784])),
    ),
    "convolution of the VAE encoder": Fault(
        how="the kernel of a convolution of the VAE encoder is upside down",
        breaks=weight_changed("vae_encoder", "encoder.down_blocks.1.conv1.weight", lambda w: _flip_rows(w)),
    ),
    "norm of the VAE decoder": Fault(
        how="the weight of the last norm of the VAE decoder is 1",
        breaks=weight_changed("vae_decoder", "decoder.norm_out.gamma", lambda w: w.fill(1)),
    ),
    "modulation of the next step": Fault(
        how="every row of the stored tables is that of the next step",
        breaks=tables_changed(next_step),
    ),
    "rows of modulation exchanged": Fault(
        how="shift and scale of the noise tokens are in each other's place in block 3",
        breaks=tables_changed(exchange_rows),
    ),
    "modulation of the output without 1": Fault(
        how="the stored tables have scale in place of 1 + scale for the output norm",
        breaks=tables_changed(scale_without_one),
    ),
    "modulation weights": Fault(
        how="the modulation weight of the text of block 1 is twice as large, and so are the tables from it",
        breaks=double_modulation,
    ),
}


def _exchange(one: Array, other: Array) -> None:
    one[:], other[:] = other.copy(), one.copy()


def _one_larger(weight: Array) -> None:
    weight[7, 11] += 1


def _flip_rows(weight: Array) -> None:
    weight[:] = weight[:, :, ::-1].copy()
