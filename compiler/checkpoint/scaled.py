"""Weights that are stored as float8 with scales beside them, read as the numbers that they stand for.

ComfyUI writes ``X.scale_weight`` beside ``X.weight``, and ``scaled_fp8`` as a mark; torchao, ModelOpt and LightX2V
write ``X.weight_scale``. The weight is the stored one times its scale, for the tensor or for each output channel.
Scales of inputs (``X.scale_input``, ``X.input_scale``) belong to products in float8, which qie does not take over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qie.compiler.checkpoint.safetensors import TensorReader, WrappedReader
from qie.engines.errors import CheckpointError

__all__ = ["scaled_reader"]

_WEIGHT_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight.scale")
_INPUT_SCALES = ("scale_input", "input_scale")
_MARK = "scaled_fp8"


def scaled_reader(reader: TensorReader) -> TensorReader:
    """A reader of the same tensors with scales applied, as float32, and hidden.

    Raises:
        CheckpointError: a float8 tensor has a scale of a kind that qie does not know, or a scale has another shape.
    """
    names = frozenset(reader.names())
    scales: dict[str, str] = {}
    hidden = {_MARK} & names
    for name in names:
        if not reader.dtype(name).startswith("float8") or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        beside = {other for other in _siblings(module) if other in names}
        found = [other for other in beside if other.removeprefix(f"{module}.") in _WEIGHT_SCALES]
        if len(found) > 1:
            raise CheckpointError(f"{name!r} has several scales ({', '.join(sorted(found))}); keep one")
        if found:
            scales[name] = found[0]
            _check_shape(name, reader.shape(name), reader.shape(found[0]))
        hidden |= beside
    if not hidden:
        return reader
    return _ScaledReader(reader=reader, scales=scales, hidden=frozenset(hidden))


def _siblings(module: str) -> list[str]:
    return [f"{module}.{kind}" for kind in (*_WEIGHT_SCALES, *_INPUT_SCALES)]


def _check_shape(name: str, weight: tuple[int, ...], scale: tuple[int, ...]) -> None:
    one = all(dim == 1 for dim in scale)
    if not (one or scale in ((weight[0],), (weight[0], *([1] * (len(weight) - 1))))):
        raise CheckpointError(
            f"the scale of {name!r} has shape {list(scale)}, expected one per tensor or per output channel of "
            f"{list(weight)}; take the checkpoint's bfloat16 original"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ScaledReader(WrappedReader):
    scales: Mapping[str, str]
    hidden: frozenset[str]

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.reader.names() if name not in self.hidden)

    def dtype(self, name: str) -> str:
        return "float32" if name in self.scales else self.reader.dtype(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        raw = self.reader.read(name)
        if name not in self.scales:
            return raw
        scale = self.reader.read(self.scales[name]).astype(np.float32)
        per_channel = (-1, *([1] * (raw.ndim - 1))) if scale.size > 1 else ()
        scaled = raw.astype(np.float32)
        scaled *= scale.reshape(per_channel)
        return scaled
