"""What is written for TensorRT-LLM: the model, its dtype, its quantization and the number of GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.recipe.schema import SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.compiler.weights.weight import DType
from qie.engines.errors import ExportError

__all__ = ["FORMATS", "TENSOR_PARALLEL", "Format", "Settings", "check_settings"]

TENSOR_PARALLEL = (1, 2, 4)
"""GPUs over which a model can be split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How TensorRT-LLM stores the quantized linears of a scheme.

    Attributes:
        quant_algo: its name of the scheme (tensorrt_llm/quantization/mode.py, QuantAlgo); None for no quantization.
        weights: quantizer of the weights [in, out]; None where TensorRT-LLM quantizes them when it builds an engine.
        inputs: quantizer of the inputs; None for weight-only quantization.
        multiple: what divides both dims of a linear on every GPU; other sizes would be padded by TensorRT-LLM, and then
            the stored tensor has another shape than the one that it expects.
    """

    quant_algo: str | None
    weights: Quantizer | None = None
    inputs: Quantizer | None = None
    multiple: int = 1


_E4M3 = Quantizer(dtype="float8_e4m3fn", bf16_scales=True)
"""TensorRT-LLM casts the scales to the model's dtype where it quantizes, and multiplies products by the scales as they
are stored (quantization/layers.py, FP8Linear.forward): bfloat16 numbers are the same in both places."""

FORMATS: dict[SchemeName, Format] = {
    "none": Format(quant_algo=None),
    "fp8": Format(quant_algo="FP8", weights=_E4M3, inputs=_E4M3),
    "int8-smooth": Format(
        quant_algo="W8A8_SQ_PER_CHANNEL",
        weights=Quantizer(dtype="int8", per="channel"),
        inputs=Quantizer(dtype="int8"),
    ),
    "w8a16": Format(quant_algo="W8A16", multiple=64),
    "w4a16": Format(
        quant_algo="W4A16_AWQ",
        weights=Quantizer(dtype="int4", per="group", group_size=128, bf16_scales=True),
        multiple=128,
    ),
}
"""Every scheme by its name in a recipe (quantization/layers.py: FP8Linear, Int8SmoothQuantLinear,
WeightOnlyQuantLinear, WeightOnlyGroupwiseQuantLinear)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a checkpoint of TensorRT-LLM is written from, beside the weights.

    Attributes:
        config: dimensions of the decoder.
        dtype: of everything that is not quantized.
        scheme: quantization scheme of the linears in ``amax``.
        amax: linear -> largest magnitude of its input, after smoothing; other linears stay in ``dtype``.
        positions: tokens of the longest prompt, which is also the number of rows of the rotary table.
        tensor_parallel: GPUs over which the model is split.
    """

    config: LanguageConfig
    dtype: DType
    positions: int
    scheme: SchemeName = "none"
    amax: Mapping[str, float] = field(default_factory=dict)
    tensor_parallel: int = 1

    @property
    def format(self) -> Format:
        """Storage of the quantized linears; that of "none" where there are none."""
        return FORMATS[self.scheme if self.amax else "none"]


def check_settings(settings: Settings) -> None:
    """Compare the model with the number of GPUs.

    Raises:
        ExportError: the model cannot be split over so many GPUs.
    """
    assert settings.positions > 0, "a model without positions"
    gpus, config = settings.tensor_parallel, settings.config
    if gpus not in TENSOR_PARALLEL:
        raise ExportError(
            f"{gpus} GPUs were requested, expected one of {', '.join(map(str, TENSOR_PARALLEL))}; use one of these",
            option="tensor_parallel",
        )
    for what, count in (
        ("attention heads", config.heads),
        ("heads of keys and values", config.kv_heads),
        ("channels of the MLPs", config.intermediate),
    ):
        if count % gpus:
            fitting = [number for number in TENSOR_PARALLEL if number < gpus and count % number == 0]
            raise ExportError(
                f"the {what} of the language model, {count}, cannot be split over {gpus} GPUs; use "
                f"{' or '.join(map(str, fitting))}",
                option="tensor_parallel",
            )
