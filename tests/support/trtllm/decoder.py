"""The decoder of one prompt, executed in float32 by numpy, rank by rank as TensorRT-LLM does.

Sources: models/qwen/model.py (QWenDecoderLayer, QWenModel), layers/mlp.py (GatedMLP: ``fc`` is activated, ``gate``
multiplies), layers/attention.py and cpp/tensorrt_llm/kernels (row i of the mrope table turns token i; pairs are
(j, j + half), the table has (cos, sin) of a pair side by side), layers/embedding.py (PromptTuningEmbedding),
quantization/layers.py (Q/DQ of activations). Sums over ranks are float32 here and the checkpoint's dtype there.

Shapes: S tokens, D width, H heads, E head size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.trtllm.config import Config
from tests.support.trtllm.stored import Array, Floats

E4M3_MAX = np.float32(448)


def one_thread() -> AbstractContextManager[Any]:
    """Inside the block, products use one thread: they are so small that waiting for another takes longer."""
    return THREADS.limit(limits=1, user_api="blas") if THREADS is not None else nullcontext()


try:
    from threadpoolctl import ThreadpoolController
except ImportError:  # it comes with scikit-learn
    THREADS = None
else:
    THREADS = ThreadpoolController()


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One rank's linear: ``weight`` [in, out] in float32, as the kernel sees it, and how it treats its input."""

    weight: Floats
    bias: Floats | None = None
    multiplier: Floats | None = None
    scale: np.float32 | None = None
    steps: str = ""

    def __call__(self, x_SD: Floats) -> Floats:
        if self.multiplier is not None:
            x_SD = x_SD * self.multiplier
        if self.scale is not None:
            x_SD = fake_quantize(x_SD, self.scale, self.steps)
        y = x_SD @ self.weight
        return y if self.bias is None else y + self.bias


def fake_quantize(x: Floats, scale: np.float32, steps: str) -> Floats:
    """``x`` in steps of ``scale``: "fp8" is E4M3 and saturates, "int8" rounds ties to even, from -128 to 127."""
    x = x / scale
    if steps == "fp8":
        return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return np.clip(np.rint(x), -128, 127) * scale


def make_linear(name: str, tensors: dict[str, Array], config: Config) -> Linear:
    """The linear ``name`` from one rank's loaded parameters."""

    def floats(part: str) -> Floats:
        return tensors[f"{name}.{part}"].astype(np.float32)

    bias = floats("bias") if f"{name}.bias" in tensors else None
    multiplier = floats("prequant_scaling_factor").reshape(-1) if f"{name}.prequant_scaling_factor" in tensors else None
    match config.quant_algo if config.is_quantized(name) else None:
        case None:
            return Linear(weight=floats("weight").T, bias=bias)
        case "FP8":
            weight = floats("weight").T * floats("weights_scaling_factor")
            return Linear(weight=weight, bias=bias, scale=floats("activation_scaling_factor")[0], steps="fp8")
        case "W8A8_SQ_PER_CHANNEL":
            weight = floats("weight").T * floats("weights_scaling_factor")
            scale = floats("activation_scaling_factor")[0]
            return Linear(weight=weight, bias=bias, multiplier=multiplier, scale=scale, steps="int8")
        case "W8A16":
            return Linear(weight=floats("weight") * floats("per_channel_scale"), bias=bias)
        case "W4A16_AWQ":
            scales = floats("weights_scaling_factor").repeat(config.group_size, axis=0)
            return Linear(weight=unpacked(tensors[f"{name}.weight"]) * scales, bias=bias, multiplier=multiplier)
    raise AssertionError(config.quant_algo)


def unpacked(packed: Array) -> Floats:
    """int4 [in, out] in bytes [in, out / 2]: the low half is the even output, two's complement (-8 to 7)."""
    halves = np.stack([packed << 4 >> 4, packed >> 4], axis=-1)  # int8 shifts keep the sign
    return halves.reshape(len(packed), -1).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer; each linear once per rank."""

    input_norm: Floats
    post_norm: Floats
    qkv: list[Linear]
    dense: list[Linear]
    fc: list[Linear]
    gate: list[Linear]
    proj: list[Linear]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The model of all ranks."""

    config: Config
    embedding: Array
    layers: list[Layer]
    norm: Floats

    def __call__(self, x_SD: Floats, rotary: Floats) -> Floats:
        """Embedded tokens and the table [positions, E / 2, 2] -> hidden states after the final norm."""
        with one_thread():
            return self._run(x_SD, rotary)

    def _run(self, x_SD: Floats, rotary: Floats) -> Floats:
        cos, sin = rotary[: len(x_SD), None, :, 0], rotary[: len(x_SD), None, :, 1]
        for layer in self.layers:
            normed = rms_norm(x_SD, layer.input_norm, self.config.eps)
            x_SD = x_SD + sum(
                dense(self._attention(qkv(normed), cos, sin)) for qkv, dense in zip(layer.qkv, layer.dense, strict=True)
            )
            normed = rms_norm(x_SD, layer.post_norm, self.config.eps)
            x_SD = x_SD + sum(
                proj(silu(fc(normed)) * gate(normed))
                for fc, gate, proj in zip(layer.fc, layer.gate, layer.proj, strict=True)
            )
        return rms_norm(x_SD, self.norm, self.config.eps)

    def embed(self, ids_S: Array, table: Floats) -> Floats:
        """Rows of the embedding, and of ``table`` for ids from the vocabulary's size on."""
        vocabulary = self.config.vocabulary
        from_table = ids_S >= vocabulary
        x_SD = self.embedding[np.where(from_table, 0, ids_S)].astype(np.float32)
        x_SD[from_table] = table[ids_S[from_table] - vocabulary]
        return x_SD

    def _attention(self, qkv: Floats, cos: Floats, sin: Floats) -> Floats:
        """Causal attention of one rank's heads; query head h attends with key head h // (heads of a key head)."""
        size, kv_heads = self.config.head_size, self.config.kv_heads_per_rank
        heads = self.config.heads // self.config.tp
        q, k, v = np.split(qkv.reshape(len(qkv), -1, size), [heads, heads + kv_heads], axis=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat(heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhe,khe->hqk", q, k) / np.float32(np.sqrt(size))
        scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khe->qhe", weights, v).reshape(len(q), -1)


def rotate(x_SHE: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x_SHE, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))
