"""LoRAs, added to the tensors of a checkpoint while they stream.

A LoRA holds for some linear layers two thin matrices, down [rank, in] and up [out, rank]. The layer's weight [out, in]
becomes W + weight * alpha / rank * up @ down (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 4.1).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qie.compiler.checkpoint.safetensors import SafetensorsReader, TensorReader, WrappedReader, open_file
from qie.engines.errors import CheckpointError
from qie.engines.files import sha256_of

__all__ = ["Lora", "fused_reader", "open_lora", "parse_lora"]

_KEY = re.compile(
    r"(?:transformer\.|diffusion_model\.|lora_unet_)?(?P<module>.+)\."
    r"(?:(?P<down>lora_A|lora_down)(?:\.default)?\.weight|(?P<up>lora_B|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
"""The keys of diffusers and PEFT (lora_A, lora_B), of kohya (lora_unet_, lora_down, lora_up) and of Lightning."""

_WEIGHT_SUFFIX = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)

_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the PEFT configuration of a LoRA (diffusers, loaders/lora_base.py)."""

_SHOWN = 5
"""How many keys an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    module: str
    down: str
    up: str
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """An open LoRA.

    Attributes:
        path: the file.
        weight: factor of the whole LoRA.
        reader: the tensors of the file.
        pairs: the matrices of each layer by the flat name of the layer.
    """

    path: Path
    weight: float
    reader: SafetensorsReader = field(repr=False)
    pairs: Mapping[str, _Pair] = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def delta(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
        """What to add to the transformer's tensor ``name`` of this shape, float32 [out, in]; None if untouched.

        Raises:
            CheckpointError: the LoRA was made for a tensor of another shape.
        """
        pair = self.pair_for(name, shape)
        if pair is None:
            return None
        down = self.reader.read(pair.down).astype(np.float32)
        up = self.reader.read(pair.up).astype(np.float32)
        difference: npt.NDArray[np.float32] = up @ down
        difference *= np.float32(self.weight * pair.scale)
        return difference

    def digest(self) -> str:
        """sha256 (hex) of the file, whose tensors these are.

        Raises:
            CheckpointError: the file was changed since it was opened.
        """
        digest = sha256_of(self.path)
        self.reader.check_unchanged()
        return digest

    def pair_for(self, name: str, shape: tuple[int, ...]) -> _Pair | None:
        """The matrices for the tensor ``name`` of this shape; None if the LoRA does not touch it.

        Raises:
            CheckpointError: the LoRA was made for a tensor of another shape.
        """
        pair = self.pairs.get(_flat(name.removesuffix(".weight"))) if name.endswith(".weight") else None
        if pair is not None and pair.shape != shape:
            raise CheckpointError(
                f"{self.path} changes {name!r} as {list(pair.shape)}, but the checkpoint has {list(shape)}; "
                "use a LoRA made for this model"
            )
        return pair


def parse_lora(text: str) -> tuple[Path, float]:
    """Split "path:0.8" into path and weight; the weight is 1.0 without a number, and where the whole is a file."""
    match = _WEIGHT_SUFFIX.fullmatch(text)
    if match is None or _is_file(_expanded(text)):
        return _expanded(text), 1.0
    return _expanded(match[1]), float(match[2])


def _expanded(text: str) -> Path:
    """A path whose ~ is the user's home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no user of that name
        return Path(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def open_lora(path: Path, weight: float) -> Lora:
    """Open a LoRA file in the key style of diffusers, PEFT, kohya or Lightning.

    Alpha is that of the layer (``….alpha``), else that of diffusers' metadata in the file, else the rank.

    Raises:
        CheckpointError: the file is missing, damaged or not a safetensors file; it holds something other than pairs
            of matrices (differences of biases, DoRA, LoHa, LoKr); a pair is incomplete or its ranks differ; the
            weight is not finite.
    """
    if not math.isfinite(weight):
        raise CheckpointError(f"the weight of {path} is {weight}; give a number such as 0.8")
    reader = open_file(path)
    layers: dict[str, dict[str, str]] = {}
    unsupported = []
    for key in reader.names():
        match = _KEY.fullmatch(key)
        if match is None:
            unsupported.append(key)
            continue
        role = next(role for role in ("down", "up", "alpha") if match[role])
        roles = layers.setdefault(_flat(match["module"]), {"module": match["module"]})
        if role in roles:
            raise CheckpointError(f"{path} holds {roles[role]!r} and {key!r}, both the {role} of one layer; keep one")
        roles[role] = key
    if unsupported:
        raise CheckpointError(
            f"{path} holds {_some(unsupported)}, expected pairs of lora_A/lora_B or lora_down/lora_up matrices without "
            "differences of weights or biases (.diff, .diff_b), DoRA, LoHa or LoKr; use a plain LoRA"
        )
    if not layers:
        raise CheckpointError(
            f"{path} is empty, expected pairs of lora_A/lora_B or lora_down/lora_up matrices; use a plain LoRA"
        )
    default_alpha = _metadata_alpha(reader)
    pairs = {flat: _pair(reader, roles, default_alpha) for flat, roles in layers.items()}
    return Lora(path=path, weight=weight, reader=reader, pairs=pairs)


def fused_reader(reader: TensorReader, loras: Sequence[Lora]) -> TensorReader:
    """A reader of the transformer's tensors with all LoRAs added: float32 where touched, raw otherwise.

    Raises:
        CheckpointError: a LoRA has layers that the transformer lacks, or of another shape.
    """
    layers = {_flat(name.removesuffix(".weight")): name for name in reader.names() if name.endswith(".weight")}
    touched = set()
    for lora in loras:
        unknown = [pair.module for flat, pair in lora.pairs.items() if flat not in layers]
        if unknown:
            raise CheckpointError(
                f"{lora.path} changes layers that the checkpoint's transformer lacks ({_some(unknown)}); "
                "use a LoRA made for this model"
            )
        for flat in lora.pairs:
            lora.pair_for(layers[flat], reader.shape(layers[flat]))
            touched.add(layers[flat])
    return _FusedReader(reader=reader, loras=tuple(loras), touched=frozenset(touched))


@dataclass(frozen=True, kw_only=True, slots=True)
class _FusedReader(WrappedReader):
    loras: tuple[Lora, ...]
    touched: frozenset[str]

    def dtype(self, name: str) -> str:
        return "float32" if name in self.touched else self.reader.dtype(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        raw = self.reader.read(name)
        if name not in self.touched:
            return raw
        fused = raw.astype(np.float32)
        for lora in self.loras:
            difference = lora.delta(name, fused.shape)
            if difference is not None:
                fused += difference
        return fused


def _flat(module: str) -> str:
    """A layer's name as kohya writes it, the one spelling that all key styles share."""
    return module.replace(".", "_")


def _some(keys: Sequence[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + rest


def _metadata_alpha(reader: SafetensorsReader) -> float | None:
    """Alpha of all layers from the PEFT configuration that diffusers stores in the file, if it does."""
    if _METADATA not in reader.metadata:
        return None
    try:
        stored = json.loads(reader.metadata[_METADATA])
        settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
        alpha = None if settings.get("lora_alpha") is None else float(settings["lora_alpha"])
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{reader.source} has broken {_METADATA} ({error}); download it again") from error
    unsupported = [key for key in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if settings.get(key)]
    if unsupported:
        raise CheckpointError(f"{reader.source} uses {_some(unsupported)}, which qie does not fuse; use a plain LoRA")
    return alpha


def _pair(reader: SafetensorsReader, roles: Mapping[str, str], default_alpha: float | None) -> _Pair:
    module = roles["module"]
    absent = [role for role in ("down", "up") if role not in roles]
    if absent:
        raise CheckpointError(
            f"{reader.source} lacks the {' and the '.join(absent)} matrix of {module!r}; download it again"
        )
    down, up = reader.shape(roles["down"]), reader.shape(roles["up"])
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
        raise CheckpointError(
            f"{reader.source} has down {list(down)} and up {list(up)} for {module!r}, expected [rank, in] and "
            "[out, rank]; use a plain LoRA"
        )
    rank = down[0]
    alpha = float(rank) if default_alpha is None else default_alpha
    if "alpha" in roles:
        if math.prod(reader.shape(roles["alpha"])) != 1:
            raise CheckpointError(f"{reader.source}: {roles['alpha']!r} has more than one element; use a plain LoRA")
        alpha = float(reader.read(roles["alpha"]).reshape(-1)[0])
    if not math.isfinite(alpha):
        raise CheckpointError(f"{reader.source} has alpha {alpha} for {module!r}, expected a number; use a plain LoRA")
    return _Pair(module=module, down=roles["down"], up=roles["up"], shape=(up[0], down[1]), scale=alpha / rank)
