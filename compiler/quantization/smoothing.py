"""Smoothing: scales that move outliers from the inputs of linears into their weights, or back, without changing values.

A linear's input is divided by a scale per channel and its weight multiplied by it. Whatever produces the input does the
division at compile time: the modulation of a LayerNorm, the weight of an RMSNorm, or the rows of the linear in front.
Only behind a GELU nothing can, and the graph keeps a multiplication.

Xiao et al., "SmoothQuant" (2023), equation 4, for 8-bit activations; Lin et al., "AWQ" (2024), section 3.2, for 4-bit
weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.checkpoint.safetensors import TensorReader, WrappedReader
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.modulation_rows import (
    MODULES,
    Half,
    block_slice,
    has_references,
    module_slice,
    streams,
)

__all__ = [
    "Group",
    "divided_outputs",
    "smoothed_modulation",
    "smoothed_reader",
    "smoothing_groups",
    "smoothing_scales",
]

Array = NDArray[np.float32]

Fold = Literal["multiply_columns", "divide_rows", "divide_attention_modulation", "divide_mlp_modulation"]
"""How scales are folded into a tensor of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears with common scales, because they share an input or because their inputs mix.

    Attributes:
        name: name of the group in a calibration.
        consumers: linears that read the scaled input.
        producers: tensors that produce that input, and how each is divided; where there are none, the graph divides.
        repeats: heads of the consumers that read one head of the producers (grouped-query attention).
        head_dim: channels of a head, 1 where ``repeats`` is 1.
    """

    name: str
    consumers: tuple[str, ...]
    producers: tuple[tuple[str, Fold], ...] = ()
    repeats: int = 1
    head_dim: int = 1

    def expand(self, values: Array) -> Array:
        """Values of the producers' channels [C] as the consumers' channels [C * repeats] see them."""
        return values.reshape(-1, self.head_dim).repeat(self.repeats, axis=0).reshape(-1)

    def reduce_max(self, values: Array) -> Array:
        """The largest of the consumers' values [C * repeats] for each of the producers' channels [C]."""
        return values.reshape(-1, self.repeats, self.head_dim).max(1).reshape(-1)


def divided_outputs(groups: Sequence[Group], scales: Mapping[str, Array]) -> dict[str, Array]:
    """The modules whose rows are divided by ``scales`` -> the divisor [channels] of their output."""
    return {
        tensor.rpartition(".")[0]: scales[group.name]
        for group in groups
        for tensor, fold in group.producers
        if fold == "divide_rows"
    }


def smoothing_groups(
    component: Component, names: Sequence[str], language: LanguageConfig | None = None
) -> tuple[Group, ...]:
    """The groups of the linears ``names`` of a component.

    ``language`` is required for the language model, unless only names are read of the groups: it decides what
    ``expand`` and ``reduce_max`` do.
    """
    blocks = dict.fromkeys(".".join(name.split(".")[: 2 if component == "transformer" else 3]) for name in names)
    if component == "transformer":
        return tuple(group for block in blocks for group in _transformer_groups(block, set(names)))
    return tuple(group for block in blocks for group in _language_groups(block, language))


def _transformer_groups(block: str, names: set[str]) -> Iterator[Group]:
    """The groups of a transformer block; the last block lacks some of its linears."""

    def present(*linears: str) -> tuple[str, ...]:
        return tuple(name for linear in linears if (name := f"{block}.{linear}") in names)

    def modulation(module: str, fold: Fold) -> tuple[tuple[str, Fold], ...]:
        return tuple((f"{block}.{module}.1.{kind}", fold) for kind in ("weight", "bias"))

    for stream, module, linears in (
        ("img", MODULES["noise"], ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("txt", MODULES["text"], ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ):
        yield Group(
            name=f"{block}.{stream}_attn",
            consumers=present(*linears),
            producers=modulation(module, "divide_attention_modulation"),
        )
        up, down = present(f"{stream}_mlp.net.0.proj"), present(f"{stream}_mlp.net.2")
        if up:
            yield Group(
                name=f"{block}.{stream}_mlp.up",
                consumers=up,
                producers=modulation(module, "divide_mlp_modulation"),
            )
            yield Group(name=f"{block}.{stream}_mlp.down", consumers=down)
    values = present("attn.to_v", "attn.add_v_proj")
    yield Group(
        name=f"{block}.attn.out",
        consumers=present("attn.to_out.0", "attn.to_add_out"),
        producers=tuple((f"{name}.{kind}", "divide_rows") for name in values for kind in ("weight", "bias")),
    )


def _language_groups(layer: str, config: LanguageConfig | None) -> Iterator[Group]:
    """The groups of a layer of the language model."""
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    yield Group(
        name=f"{attention}.qkv",
        consumers=tuple(f"{attention}.{name}_proj" for name in "qkv"),
        producers=((f"{layer}.input_layernorm.weight", "divide_rows"),),
    )
    yield Group(
        name=f"{attention}.out",
        consumers=(f"{attention}.o_proj",),
        producers=((f"{attention}.v_proj.weight", "divide_rows"), (f"{attention}.v_proj.bias", "divide_rows")),
        repeats=1 if config is None else config.heads // config.kv_heads,
        head_dim=1 if config is None else config.head_dim,
    )
    yield Group(
        name=f"{mlp}.up",
        consumers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        producers=((f"{layer}.post_attention_layernorm.weight", "divide_rows"),),
    )
    yield Group(
        name=f"{mlp}.down",
        consumers=(f"{mlp}.down_proj",),
        producers=((f"{mlp}.up_proj.weight", "divide_rows"),),
    )


def smoothing_scales(inputs: Array, weights: Array, alpha: float) -> Array:
    """Scales [C] of a group from the magnitudes of its inputs [C] and weights [C]: inputs^alpha / weights^(1 - alpha).

    A channel whose inputs or weights are all 0 gets the scale 1. The geometric mean of the other scales is 1.
    """
    alive = (inputs > 0) & (weights > 0)
    logarithms = np.zeros(len(inputs), np.float64)
    logarithms[alive] = alpha * np.log(inputs[alive]) - (1 - alpha) * np.log(weights[alive])
    if alive.any():
        logarithms[alive] -= logarithms[alive].mean()
    return np.exp(logarithms).astype(np.float32)


def smoothed_reader(reader: TensorReader, groups: Sequence[Group], scales: Mapping[str, Array]) -> TensorReader:
    """``reader`` with the scales (group -> [channels]) of ``groups`` folded into its tensors."""
    folds: dict[str, list[tuple[Fold, Array]]] = {}
    for group in groups:
        values = scales[group.name]
        for name in group.consumers:
            folds.setdefault(f"{name}.weight", []).append(("multiply_columns", group.expand(values)))
        for tensor, fold in group.producers:
            folds.setdefault(tensor, []).append((fold, values))
    return _SmoothedReader(reader=reader, folds=folds)


def smoothed_modulation(modulation_LM: Array, groups: Sequence[Group], scales: Mapping[str, Array]) -> Array:
    """The modulation [layers, rows * width] of one timestep as smoothed modulation weights compute it."""
    smoothed_LM = modulation_LM.copy()
    for group in groups:
        for tensor, fold in group.producers:
            half = _MODULATED_HALF.get(fold)
            if half is None or not tensor.endswith(".bias"):  # the weight belongs to the same row as its bias
                continue
            _, layer, module, *_ = tensor.split(".")
            values, width = scales[group.name], len(scales[group.name])
            references = has_references(modulation_LM.shape[1], width)
            for stream in streams(references=references):
                if MODULES[stream] == module:
                    shift = block_slice(stream, half, "shift", width, references=references)
                    gain = block_slice(stream, half, "scale", width, references=references)
                    smoothed_LM[int(layer), shift] /= values
                    smoothed_LM[int(layer), gain] /= values
    return smoothed_LM


@dataclass(frozen=True, kw_only=True, slots=True)
class _SmoothedReader(WrappedReader):
    """Keeps the checkpoint's dtype: smoothing does not change the precision in which a tensor is worth storing."""

    folds: Mapping[str, Sequence[tuple[Fold, Array]]]

    def read(self, name: str) -> NDArray[Any]:
        raw = self.reader.read(name)
        if name not in self.folds:
            return raw
        tensor = raw.astype(np.float32)
        for fold, values in self.folds[name]:
            _FOLDS[fold](tensor, values)
        return tensor


def _multiply_columns(tensor: Array, values: Array) -> None:
    tensor *= values


def _divide_rows(tensor: Array, values: Array) -> None:
    tensor /= values.reshape(-1, *(1,) * (tensor.ndim - 1))


def _divide_modulation(half: Half) -> Callable[[Array, Array], None]:
    """Divide LayerNorm(x) * (1 + scale) + shift of one half of a block (transformer_qwenimage.py,
    QwenImageTransformerBlock._modulate); ``tensor`` is the weight or the bias of the linear that makes the rows."""

    def divide(tensor: Array, values: Array) -> None:
        width = len(values)
        shift, scale = tensor[module_slice(half, "shift", width)], tensor[module_slice(half, "scale", width)]
        _divide_rows(shift, values)
        if tensor.ndim == 1:
            scale += 1
        _divide_rows(scale, values)
        if tensor.ndim == 1:
            scale -= 1

    return divide


_MODULATED_HALF: dict[Fold, Half] = {
    "divide_attention_modulation": "attention",
    "divide_mlp_modulation": "mlp",
}
"""The half of a block whose modulation a fold divides."""

_FOLDS: dict[Fold, Callable[[Array, Array], None]] = {
    "multiply_columns": _multiply_columns,
    "divide_rows": _divide_rows,
    "divide_attention_modulation": _divide_modulation("attention"),
    "divide_mlp_modulation": _divide_modulation("mlp"),
}
