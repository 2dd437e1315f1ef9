"""The parameters of QWenForCausalLM without its head, one rank's: names, shapes and dtypes; and what loading does.

Sources: models/qwen/model.py, layers/attention.py and layers/mlp.py (modules), quantization/layers.py (FP8Linear,
Int8SmoothQuantLinear, WeightOnlyQuantLinear, WeightOnlyGroupwiseQuantLinear and their RowLinear twins),
quantization/quantize.py, models/modeling_utils.py (``preprocess_perlayer_weights``, ``load``), parameter.py (the
setter of ``value``), models/convert_utils.py (``weight_only_quantize_dict``).

Three kinds of mismatch: a missing tensor and a wrong shape end the loading with a RuntimeError; a tensor that nothing
needs and another dtype are warnings of the library, after which the network's types contradict each other or a weight
goes unused. Here all three are errors.
"""

import fnmatch
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from tests.support.trtllm.config import Config
from tests.support.trtllm.stored import Array

Shape = tuple[int, ...]

NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8, FLOAT = np.dtype(np.int8), np.dtype(np.float32)
WEIGHT_ONLY = ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")
"""Parts of the names that ``weight_only_quantize_dict`` quantizes."""


def linears(config: Config) -> Iterator[tuple[str, int, int, bool]]:
    """Name, inputs, outputs (of one rank) and whether the outputs are split, which a bias of qkv goes with."""
    tp, head = config.tp, config.head_size
    rows = config.heads // tp * head
    for layer in range(config.layers):
        prefix = f"transformer.layers.{layer}."
        yield prefix + "attention.qkv", config.width, rows + 2 * config.kv_heads_per_rank * head, True
        yield prefix + "attention.dense", rows, config.width, False
        yield prefix + "mlp.fc", config.width, config.intermediate // tp, True
        yield prefix + "mlp.gate", config.width, config.intermediate // tp, True
        yield prefix + "mlp.proj", config.intermediate // tp, config.width, False


def parameters(config: Config) -> dict[str, tuple[Shape, np.dtype[np.generic]]]:
    """Name -> shape and dtype of what ``load`` wants, after the preprocessing."""
    for name in ("heads", "intermediate"):
        assert not getattr(config, name) % config.tp, f"{name} {getattr(config, name)} is no multiple of {config.tp}"
    dtype = NUMPY[config.dtype]
    found: dict[str, tuple[Shape, np.dtype[np.generic]]] = {}
    embedding = "transformer.vocab_embedding"
    found[f"{embedding}.weight"] = ((config.vocabulary, config.width), dtype)
    if config.quant_algo == "W8A16" and config.is_quantized(embedding):
        found[f"{embedding}.weight"] = ((config.vocabulary, config.width), INT8)
        found[f"{embedding}.per_token_scale"] = ((config.vocabulary,), dtype)
    for layer in range(config.layers):
        for norm in ("input_layernorm", "post_layernorm"):
            found[f"transformer.layers.{layer}.{norm}.weight"] = ((config.width,), dtype)
    found["transformer.ln_f.weight"] = ((config.width,), dtype)
    for name, inputs, outputs, split in linears(config):
        algorithm = config.quant_algo if config.is_quantized(name) else None
        if algorithm in ("W8A16", "W4A16_AWQ"):  # padded where it does not divide; then nothing of the file fits
            multiple = 64 if algorithm == "W8A16" else max(64, config.group_size)
            whole_in, whole_out = (inputs, outputs * config.tp) if split else (inputs * config.tp, outputs)
            whole_in, whole_out = (
                -(-whole // (multiple * config.tp)) * multiple * config.tp for whole in (whole_in, whole_out)
            )
            inputs, outputs = (whole_in, whole_out // config.tp) if split else (whole_in // config.tp, whole_out)
        match algorithm:
            case None:
                found[f"{name}.weight"] = ((outputs, inputs), dtype)
            case "FP8":
                found[f"{name}.weight"] = ((outputs, inputs), FP8)
                found[f"{name}.activation_scaling_factor"] = ((1,), FLOAT)
                found[f"{name}.weights_scaling_factor"] = ((1,), FLOAT)
            case "W8A8_SQ_PER_CHANNEL":
                found[f"{name}.weight"] = ((outputs, inputs), INT8)
                found[f"{name}.activation_scaling_factor"] = ((1,), FLOAT)
                found[f"{name}.weights_scaling_factor"] = ((outputs,), FLOAT)
                found[f"{name}.prequant_scaling_factor"] = ((inputs,), dtype)
            case "W8A16":
                found[f"{name}.weight"] = ((inputs, outputs), INT8)
                found[f"{name}.per_channel_scale"] = ((outputs,), dtype)
            case "W4A16_AWQ":  # int4 seen as 16-bit numbers; kept as int8 here, two to a byte
                found[f"{name}.weight"] = ((inputs, outputs // 2), INT8)
                found[f"{name}.weights_scaling_factor"] = ((inputs // config.group_size, outputs), dtype)
                if config.pre_quant_scale:
                    found[f"{name}.prequant_scaling_factor"] = ((1, inputs), dtype)
        if split and config.bias and name.endswith("qkv"):
            found[f"{name}.bias"] = ((outputs,), dtype)
    return found


def preprocess(tensors: dict[str, Array], config: Config) -> dict[str, Array]:
    """What loading makes of one rank's tensors, but for the order in which a GPU's kernel wants weights."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        match config.quant_algo:
            case "FP8" if name.endswith("weight") and tensor.dtype == INT8:
                result[name] = tensor.view(FP8)
            case "W4A16_AWQ":
                if name.endswith("weight") and tensor.dtype == INT8:
                    result[name] = tensor.T
                    rows, columns = tensor.T.shape  # preprocess_weights_for_mixed_gemm
                    assert not rows % 64 and not columns % 8, f"{name}: {rows} inputs, {columns} bytes of outputs"
                elif name.endswith("weights_scaling_factor"):
                    result[name] = tensor.T.astype(NUMPY[config.dtype])
                elif name.endswith("prequant_scaling_factor"):
                    result[name] = tensor.reshape(1, -1)
            case "W8A16":
                patterns = config.excluded if config.excluded is not None else ("*shared_expert_gate.weight",)
                chosen = any(part in name for part in WEIGHT_ONLY)
                if chosen and tensor.dtype == INT8:
                    raise RuntimeError(f"{name} is int8: weights in the order of one kind of GPU, unknown here")
                if chosen and not any(fnmatch.fnmatchcase(name, each) for each in patterns):
                    result[name], scale = quantize_channels(tensor)
                    result[name.replace(".weight", ".per_channel_scale")] = scale
    return result


def quantize_channels(weight: Array) -> tuple[Array, Array]:
    """int8 [in, out] and scales [out] of a weight [out, in]: symmetric, the largest magnitude is 128 steps.

    (cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, ``symmetric_quantize``: the steps are those of
    the float32 scale, which is stored in the weight's dtype; ties away from 0.)
    """
    values = weight.T.astype(np.float32)
    scale = np.abs(values).max(0) / np.float32(128)
    steps = values / np.where(scale > 0, scale, 1)
    steps = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)
    return np.clip(steps, -128, 127).astype(np.int8), scale.astype(weight.dtype)


def load(tensors: dict[str, Array], config: Config, *, strict: bool = True) -> dict[str, Array]:
    """The parameters of one rank, or the loader's RuntimeError; with ``strict`` also for what it only warns of."""
    tensors = preprocess(tensors, config)
    wanted = parameters(config)
    if missing := wanted.keys() - tensors.keys():
        raise RuntimeError(f"Required but not provided tensors:{missing}")
    if strict and (extra := tensors.keys() - wanted.keys()):
        raise RuntimeError(f"Provided but not required tensors: {extra}")
    loaded = {}
    for name, (shape, dtype) in wanted.items():
        tensor = tensors[name]
        if tensor.ndim == 0 and shape and math.prod(shape) == 1:
            tensor = tensor.reshape(shape)
        if tensor.shape != shape:
            problem = "The value updated is not the same shape as the original. "
            problem += f"Updated: {tensor.shape}, original: {shape}"
            raise RuntimeError(f"Encounter error '{problem}' for parameter '{name}'")
        if strict and tensor.dtype != dtype:
            raise RuntimeError(f"Parameter {name} was initialized as {dtype} but set to {tensor.dtype}")
        loaded[name] = tensor
    return loaded
