"""The tensors of a TensorRT-LLM checkpoint: names, shapes and dtypes, and what they are made from.

Sources, TensorRT-LLM 1.2.1: models/qwen/model.py and layers/attention.py for the modules, models/qwen/convert.py for
the split over GPUs, models/modeling_utils.py (preprocess_perlayer_weights) and quantization/layers.py for quantized
tensors. Weights are [out, in] as in the checkpoint of Qwen2.5-VL.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes  # noqa: F401  registers its dtypes with numpy by name
import numpy as np

from qie.compiler.backends.tensorrt_llm.settings import FORMATS, Format, Settings, check_settings
from qie.compiler.weights.weight import Stored, Weight
from qie.engines.errors import ExportError, RecipeError

__all__ = [
    "Module",
    "Source",
    "Tensor",
    "checkpoint_bytes",
    "excluded_modules",
    "modules",
    "sources",
    "tensors",
    "whole_groups",
]

Split = Literal["out", "in"]
"""The dim of a weight that is split over GPUs: as in a ColumnLinear or a RowLinear."""

_PER_LAYER = (
    ("input_layernorm", ("input_layernorm",)),
    ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attention.dense", ("self_attn.o_proj",)),
    ("post_layernorm", ("post_attention_layernorm",)),
    ("mlp.fc", ("mlp.gate_proj",)),
    ("mlp.gate", ("mlp.up_proj",)),
    ("mlp.proj", ("mlp.down_proj",)),
)
"""TensorRT-LLM's modules of a layer, and the linears or norms of Qwen2.5-VL that they hold. The activation reads what
TensorRT-LLM's ``fc`` returns, so that ``gate`` is the checkpoint's ``up_proj``."""

_SHARED_SCALES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
"""Linears of a layer that TensorRT-LLM executes as one: their input has one scale, and so have their weights where they
are quantized per tensor. It concatenates ``fc`` and ``gate`` in an engine and quantizes them again by the larger scale
(models/modeling_utils.py, fuse_gate_mlp); with equal scales that changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A module of the text encoder.

    Attributes:
        name: without ``.weight``, with the canonical prefix.
        shape: of its weight: [out, in] of a linear, [out] of a norm.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor in the file of one GPU."""

    name: str
    shape: tuple[int, ...]
    dtype: Stored

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A module of TensorRT-LLM's model.

    Attributes:
        name: without ``.weight``.
        sources: modules of the text encoder; their weights are concatenated by outputs.
        split: how it is split over GPUs; None where every GPU has all of it.
        bias: whether it has a bias.
        format: storage of a quantized linear; that of "none" for any other module.
        scaled_with: sources that share the scale of the input, and that of the weights where it is per tensor.
    """

    name: str
    sources: tuple[Source, ...]
    split: Split | None = None
    bias: bool = False
    format: Format = FORMATS["none"]
    scaled_with: tuple[Source, ...] = ()


def modules(settings: Settings) -> tuple[Module, ...]:
    """The modules of the model, in the order of execution.

    Raises:
        ExportError: the sizes of the model cannot be split over the GPUs, or quantized.
        RecipeError: only some of the linears that TensorRT-LLM fuses are quantized.
    """
    check_settings(settings)
    config = settings.config
    found = [
        Module(
            name="transformer.vocab_embedding",
            sources=(Source(name="language_model.embed_tokens", shape=(config.vocabulary, config.width)),),
        )
    ]
    linears: set[str] = set()
    for layer in range(config.layers):
        for name, parts in _PER_LAYER:
            module = _module(settings, layer, name, parts)
            linears.update(source.name for source in module.sources if module.split)
            found.append(module)
    found.append(Module(name="transformer.ln_f", sources=(Source(name="language_model.norm", shape=(config.width,)),)))
    unknown = set(settings.amax) - linears
    assert not unknown, f"amax of linears that the model does not have: {sorted(unknown)[:3]}"
    return tuple(found)


def sources(settings: Settings) -> tuple[Weight, ...]:
    """Every tensor that is read, as weights of the text encoder in the dtype in which it is read.

    Raises:
        ExportError, RecipeError: as in ``modules``.
    """
    return tuple(
        Weight(name=f"{source.name}.{kind}", subfolder="text_encoder", shape=shape, dtype=settings.dtype)
        for module in modules(settings)
        for source in module.sources
        for kind, shape in (("weight", source.shape), *([("bias", source.shape[:1])] if module.bias else []))
    )


def tensors(module: Module, settings: Settings) -> tuple[Tensor, ...]:
    """The tensors of ``module`` in the file of each GPU."""
    gpus, dtype = settings.tensor_parallel, settings.dtype
    out = sum(source.shape[0] for source in module.sources) // (gpus if module.split == "out" else 1)
    inner = tuple(size // (gpus if module.split == "in" else 1) for size in module.sources[0].shape[1:])
    quantizer = module.format.weights
    found: dict[str, tuple[tuple[int, ...], Stored]] = {"weight": ((out, *inner), dtype)}
    match quantizer.dtype if quantizer else None:
        case "float8_e4m3fn":
            found["weight"] = ((out, *inner), "float8_e4m3fn")
            found["weights_scaling_factor"] = ((1,), "float32")
        case "int8":
            found["weight"] = ((out, *inner), "int8")
            found["weights_scaling_factor"] = ((out,), "float32")
            found["prequant_scaling_factor"] = (inner, dtype)
        case "int4":
            assert quantizer is not None
            found["weight"] = ((out // 2, *inner), "int8")  # two outputs in one byte
            found["weights_scaling_factor"] = ((out, inner[0] // quantizer.group_size), dtype)
    if module.format.inputs:
        found["activation_scaling_factor"] = ((1,), "float32")
    if module.bias:
        found["bias"] = ((out,), dtype)
    return tuple(
        Tensor(name=f"{module.name}.{kind}", shape=shape, dtype=stored) for kind, (shape, stored) in found.items()
    )


def checkpoint_bytes(settings: Settings) -> int:
    """Size of all tensors in the files of all GPUs, in bytes.

    Raises:
        ExportError, RecipeError: as in ``modules``.
    """
    per_gpu = sum(tensor.bytes for module in modules(settings) for tensor in tensors(module, settings))
    return per_gpu * settings.tensor_parallel


def excluded_modules(settings: Settings) -> tuple[str, ...]:
    """The linears of TensorRT-LLM's model that stay in the model's dtype.

    Raises:
        ExportError, RecipeError: as in ``modules``.
    """
    return tuple(module.name for module in modules(settings) if module.split and module.format.quant_algo is None)


def whole_groups(amax: Mapping[str, float]) -> dict[str, float]:
    """``amax`` of the linears that can be quantized: those whose partners in execution are all in it."""
    found = {}
    for name, value in amax.items():
        *layer, module, linear = name.split(".")
        partners = next((group for group in _SHARED_SCALES if f"{module}.{linear}" in group), ())
        if all(".".join([*layer, partner]) in amax for partner in partners):
            found[name] = value
    return found


def _module(settings: Settings, layer: int, name: str, parts: tuple[str, ...]) -> Module:
    """The module ``name`` of a layer, made from ``parts``."""
    shapes = _shapes(settings)

    def source(part: str) -> Source:
        return Source(name=f"language_model.layers.{layer}.{part}", shape=shapes[part])

    found = tuple(source(part) for part in parts)
    full_name = f"transformer.layers.{layer}.{name}"
    if len(found[0].shape) == 1:
        return Module(name=full_name, sources=found)
    partners = next((group for group in _SHARED_SCALES if parts[0] in group), parts)
    scaled_with = tuple(source(part) for part in partners)
    module = Module(
        name=full_name,
        sources=found,
        split="in" if parts[0] in ("self_attn.o_proj", "mlp.down_proj") else "out",
        bias=name == "attention.qkv",
        format=settings.format if _is_quantized(settings, scaled_with) else FORMATS["none"],
        scaled_with=scaled_with,
    )
    _check_multiple(settings, module)
    return module


def _shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a layer, by name."""
    config = settings.config
    width, inner, kv_width = config.width, config.intermediate, config.kv_heads * config.head_dim
    return {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }


def _is_quantized(settings: Settings, together: tuple[Source, ...]) -> bool:
    """Whether these linears are quantized: all of them or none."""
    if settings.format.quant_algo is None:
        return False
    quantized = [source.name for source in together if source.name in settings.amax]
    if quantized and len(quantized) < len(together):
        rest = [source.name for source in together if source.name not in settings.amax]
        raise RecipeError(
            f"components.language.exclude leaves out {', '.join(rest)} and not {', '.join(quantized)}, which "
            "TensorRT-LLM executes as one linear; exclude all of them or none"
        )
    return bool(quantized)


def _check_multiple(settings: Settings, module: Module) -> None:
    """Compare the sizes of a linear with what its format can store."""
    # TensorRT-LLM pads either dim to a multiple for all GPUs, whichever dim it splits (quantization/layers.py).
    multiple = module.format.multiple * settings.tensor_parallel
    out, inner = sum(source.shape[0] for source in module.sources), module.sources[0].shape[1]
    if module.format.multiple > 1 and (out % multiple or inner % multiple):
        name = module.sources[0].name if len(module.sources) == 1 else module.name
        raise ExportError(
            f"{name} has {inner} inputs and {out} outputs, and {module.format.quant_algo} of TensorRT-LLM needs "
            f"multiples of {multiple}; take another scheme for components.language, or exclude this linear"
        )
