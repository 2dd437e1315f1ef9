"""Smoothing: factors that move what is hard to quantize from activations into weights, or back, at no change of values.

A linear's input is divided by a factor a channel and its weight multiplied by it. The division is done by whatever
makes the input, at compile time: by the modulation of a LayerNorm, by the weight of an RMSNorm, by the rows of the
linear before. Only behind a GELU there is nothing that could do it, and it stays as a multiplication in the graph.

Xiao et al., "SmoothQuant" (2023), equation 4, for 8-bit activations; Lin et al., "AWQ" (2024), section 3.2, for 4-bit
weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.engines.bundle.manifest import Component

__all__ = ["Group", "factor", "groups", "smoothed_modulation", "smoothed_reader"]

Array = NDArray[np.float32]
Step = Literal["columns", "rows", "norm", "attention modulation", "feed-forward modulation"]
"""What a factor does to a tensor: multiply its columns, divide its rows, or divide what a norm puts out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that share a factor, because they share an input or because their inputs mix.

    ``readers`` are the linears, ``makers`` the tensors that make their input and how each is divided; without makers
    the graph divides. A channel of the makers is read by ``shared`` heads of ``head_dim`` channels.
    """

    name: str
    readers: tuple[str, ...]
    makers: tuple[tuple[str, Step], ...] = ()
    shared: int = 1
    head_dim: int = 1

    def spread(self, values: Array) -> Array:
        """Values of the makers' channels [M], as the readers' [M * shared] see them."""
        return values.reshape(-1, self.head_dim).repeat(self.shared, axis=0).reshape(-1)

    def most(self, values: Array) -> Array:
        """The largest of the readers' values [M * shared] for each of the makers' channels [M]."""
        return values.reshape(-1, self.shared, self.head_dim).max(1).reshape(-1)


def groups(component: Component, names: Sequence[str], language: LanguageConfig | None = None) -> tuple[Group, ...]:
    """The groups of the linears ``names`` of a component; ``language`` is the config where that is the component."""
    blocks = dict.fromkeys(".".join(name.split(".")[: 2 if component == "transformer" else 3]) for name in names)
    if component == "transformer":
        return tuple(group for block in blocks for group in _of_block(block, set(names)))
    assert language is not None
    return tuple(group for block in blocks for group in _of_layer(block, language))


def _of_block(block: str, names: set[str]) -> Iterator[Group]:
    """Of a block of the transformer; what the last one does not read is left out."""

    def there(*linears: str) -> tuple[str, ...]:
        return tuple(name for linear in linears if (name := f"{block}.{linear}") in names)

    for stream, linears in (
        ("img", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("txt", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ):
        modulation = f"{block}.{stream}_mod.1"
        both: tuple[tuple[str, Step], ...] = tuple(
            (f"{modulation}.{kind}", "attention modulation") for kind in ("weight", "bias")
        )
        yield Group(name=f"{block}.{stream}_attn", readers=there(*linears), makers=both)
        up, down = there(f"{stream}_mlp.net.0.proj"), there(f"{stream}_mlp.net.2")
        if up:
            rows: tuple[tuple[str, Step], ...] = tuple((name, "feed-forward modulation") for name, _ in both)
            yield Group(name=f"{block}.{stream}_mlp.up", readers=up, makers=rows)
            yield Group(name=f"{block}.{stream}_mlp.down", readers=down)
    values = there("attn.to_v", "attn.add_v_proj")
    yield Group(
        name=f"{block}.attn.out",
        readers=there("attn.to_out.0", "attn.to_add_out"),
        makers=tuple((f"{name}.{kind}", "rows") for name in values for kind in ("weight", "bias")),
    )


def _of_layer(layer: str, config: LanguageConfig) -> Iterator[Group]:
    """Of a layer of the language model."""
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    projections = tuple(f"{attention}.{name}_proj" for name in "qkv")
    yield Group(name=f"{attention}.qkv", readers=projections, makers=((f"{layer}.input_layernorm.weight", "norm"),))
    yield Group(
        name=f"{attention}.out",
        readers=(f"{attention}.o_proj",),
        makers=((f"{attention}.v_proj.weight", "rows"), (f"{attention}.v_proj.bias", "rows")),
        shared=config.heads // config.kv_heads,
        head_dim=config.head_dim,
    )
    yield Group(
        name=f"{mlp}.up",
        readers=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        makers=((f"{layer}.post_attention_layernorm.weight", "norm"),),
    )
    yield Group(name=f"{mlp}.down", readers=(f"{mlp}.down_proj",), makers=((f"{mlp}.up_proj.weight", "rows"),))


def factor(inputs: Array, weights: Array, alpha: float) -> Array:
    """Factors of a group from magnitudes of its inputs and its weights by channel: inputs^alpha / weights^(1 - alpha).

    Channels of which one of the two is 0 are left alone; the geometric mean is 1.
    """
    alive = (inputs > 0) & (weights > 0)
    logarithms = np.zeros(len(inputs), np.float64)
    logarithms[alive] = alpha * np.log(inputs[alive]) - (1 - alpha) * np.log(weights[alive])
    if alive.any():
        logarithms[alive] -= logarithms[alive].mean()
    return np.exp(logarithms).astype(np.float32)


def smoothed_reader(reader: TensorReader, smoothed: Sequence[Group], factors: Mapping[str, Array]) -> TensorReader:
    """``reader`` with the factors (group name -> [channels]) of ``smoothed`` in its weights."""
    steps: dict[str, list[tuple[Step, Array]]] = {}
    for group in smoothed:
        values = factors[group.name]
        for name in group.readers:
            steps.setdefault(f"{name}.weight", []).append(("columns", group.spread(values)))
        for tensor, step in group.makers:
            steps.setdefault(tensor, []).append((step, values))
    return _SmoothedReader(reader=reader, steps=steps)


def smoothed_modulation(rows: Array, smoothed: Sequence[Group], factors: Mapping[str, Array]) -> Array:
    """What the modulation of one timestep, [layers, rows * D] (``qie.engines.inputs.modulation``), is when it is
    computed from smoothed weights."""
    made = rows.copy()
    for group in smoothed:
        for tensor, step in group.makers:
            if tensor.endswith("_mod.1.bias"):
                values = factors[group.name]
                _, layer, module, *_ = tensor.split(".")
                image = len(made[int(layer)]) - 6 * len(values)  # text comes last
                for first in range(0, image, 6 * len(values)) if module == "img_mod" else (image,):
                    for row in (first + _FIRST[step] * len(values), first + (_FIRST[step] + 1) * len(values)):
                        made[int(layer), row : row + len(values)] /= values
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class _SmoothedReader:
    """``dtype`` is still that of the checkpoint: what a tensor is worth storing in has not changed."""

    reader: TensorReader
    steps: Mapping[str, Sequence[tuple[Step, Array]]]

    def names(self) -> tuple[str, ...]:
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(name)

    def dtype(self, name: str) -> str:
        return self.reader.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        raw = self.reader.read(name)
        if name not in self.steps:
            return raw
        tensor = raw.astype(np.float32)
        for step, values in self.steps[name]:
            _SMOOTH[step](tensor, values)
        return tensor


def _columns(tensor: Array, values: Array) -> None:
    tensor *= values


def _rows(tensor: Array, values: Array) -> None:
    tensor /= values.reshape(-1, *(1,) * (tensor.ndim - 1))


def _modulation(first: int) -> Any:
    """Divide LayerNorm(x) * (1 + scale) + shift, whose shift is the ``first`` of six parts of a modulation's output
    (transformer_qwenimage.py, QwenImageTransformerBlock._modulate) and its scale the next."""

    def divide(tensor: Array, values: Array) -> None:
        width = len(values)
        shift, scale = tensor[first * width : (first + 1) * width], tensor[(first + 1) * width : (first + 2) * width]
        _rows(shift, values)
        if tensor.ndim == 1:
            scale += 1
        _rows(scale, values)
        if tensor.ndim == 1:
            scale -= 1

    return divide


_FIRST: dict[Step, int] = {"attention modulation": 0, "feed-forward modulation": 3}
"""Of the six parts of a modulation's output the shift; the scale is the next."""

_SMOOTH: dict[Step, Any] = {
    "columns": _columns,
    "rows": _rows,
    "norm": _rows,
    **{step: _modulation(first) for step, first in _FIRST.items()},
}
