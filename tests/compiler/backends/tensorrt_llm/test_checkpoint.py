"""A TensorRT-LLM checkpoint: every tensor under its name, in its place and by value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.tensors import checkpoint_bytes
from qie.compiler.weights.quantizer import Quantizer
from tests.support.language_weights import (
    LANGUAGE,
    LINEARS,
    language_settings,
    language_weights,
    linears,
    stored,
)
from tests.support.tensors import Tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LAYER = "language_model.layers.1."
QKV = tuple(f"{LAYER}{part}" for part in LINEARS[:3])
NAMES = {
    "attention.dense": "self_attn.o_proj",
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}


def write(folder: Path, **fields: Any) -> tuple[Tensors, dict[str, np.ndarray]]:
    """The source and what rank 0 gets of it."""
    settings = language_settings(**fields)
    source = language_weights(settings)
    write_checkpoint(settings, source, folder)
    return source, stored(folder / "rank0.safetensors")


def joined(source: Tensors, names: tuple[str, ...], kind: str = "weight") -> np.ndarray:
    return np.concatenate([source.read(f"{name}.{kind}") for name in names])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensors_that_are_not_quantized(tmp_path: Path, dtype: Any) -> None:
    source, found = write(tmp_path, dtype=dtype)
    expected = {
        "transformer.vocab_embedding.weight": source.read("language_model.embed_tokens.weight"),
        "transformer.ln_f.weight": source.read("language_model.norm.weight"),
    }
    for layer in range(2):
        theirs, ours = f"transformer.layers.{layer}.", f"language_model.layers.{layer}."
        qkv = tuple(f"{ours}self_attn.{part}_proj" for part in "qkv")
        expected |= {
            f"{theirs}input_layernorm.weight": source.read(f"{ours}input_layernorm.weight"),
            f"{theirs}post_layernorm.weight": source.read(f"{ours}post_attention_layernorm.weight"),
            f"{theirs}attention.qkv.weight": joined(source, qkv),
            f"{theirs}attention.qkv.bias": joined(source, qkv, "bias"),
        }
        expected |= {f"{theirs}{name}.weight": source.read(f"{ours}{part}.weight") for name, part in NAMES.items()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.dtype(dtype), name
        assert np.array_equal(found[name], value.astype(np.dtype(dtype))), name


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    _, found = write(tmp_path, scheme="int8-smooth", dtype="float32")
    with safe_open(tmp_path / "rank0.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(found)
        assert all(np.array_equal(file.get_tensor(name), value) for name, value in found.items())


@pytest.mark.parametrize(
    ("scheme", "gpus"),
    [("none", 1), ("fp8", 1), ("int8-smooth", 1), ("w8a16", 1), ("w4a16", 1), ("fp8", 2), ("int8-smooth", 4)],
)
def test_sizes_and_progress(tmp_path: Path, scheme: Any, gpus: int) -> None:
    """Progress reaches the bytes of all files."""
    settings = language_settings(scheme=scheme, tensor_parallel=gpus)
    reports: list[tuple[int, int]] = []
    names = write_checkpoint(
        settings, language_weights(settings), tmp_path, progress=lambda *report: reports.append(report)
    )
    assert names == ("config.json", *(f"rank{rank}.safetensors" for rank in range(gpus)))
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    sizes = sum((tmp_path / name).stat().st_size for name in names[1:])
    assert reports[-1] == (sizes, sizes) and reports == sorted(reports)
    values = [value for name in names[1:] for value in stored(tmp_path / name).values()]
    assert sum(value.nbytes for value in values) == checkpoint_bytes(settings) < sizes


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    """torch cannot view others. The weights of this model have an odd number of bytes."""
    config = replace(LANGUAGE, layers=1, width=6, heads=1, kv_heads=1, intermediate=3, mrope_section=(1, 1, 1))
    _, found = write(tmp_path, config=config, scheme="int8-smooth")
    content = (tmp_path / "rank0.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and any(value.nbytes % 4 for value in found.values())
    assert [name for name, value in found.items() if entries[name]["data_offsets"][0] % value.itemsize] == []


def test_fp8(tmp_path: Path) -> None:
    """One scale for the linears that TensorRT-LLM executes as one: q, k and v; gate and up."""
    source, found = write(tmp_path, scheme="fp8")
    amax = dict(zip(linears(), range(1, 15), strict=True))
    for name, parts, together in (
        ("attention.qkv", QKV, QKV),
        ("attention.dense", (f"{LAYER}self_attn.o_proj",), (f"{LAYER}self_attn.o_proj",)),
        ("mlp.fc", (f"{LAYER}mlp.gate_proj",), (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj")),
        ("mlp.gate", (f"{LAYER}mlp.up_proj",), (f"{LAYER}mlp.gate_proj", f"{LAYER}mlp.up_proj")),
        ("mlp.proj", (f"{LAYER}mlp.down_proj",), (f"{LAYER}mlp.down_proj",)),
    ):
        weight, module = joined(source, parts), f"transformer.layers.1.{name}"
        scale = (np.abs(joined(source, together)).max() / 448).astype(BF16).astype(np.float32)
        for kind, expected in (
            ("weights_scaling_factor", scale),
            ("activation_scaling_factor", np.float32(max(amax[part] for part in together) / 448).astype(BF16)),
        ):
            factor = found[f"{module}.{kind}"]
            assert factor.dtype == np.float32 and factor.shape == (1,) and factor[0] == np.float32(expected)
        quantized = found[f"{module}.weight"]
        assert quantized.dtype == E4M3
        assert np.array_equal(quantized, np.clip(weight / scale, -448, 448).astype(E4M3))
        error = np.abs(quantized.astype(np.float32) * scale - weight)
        assert (error <= np.abs(weight) / 16 + scale * 2**-10).all()
    assert found["transformer.layers.1.attention.qkv.bias"].dtype == BF16
    assert found["transformer.vocab_embedding.weight"].dtype == BF16


def test_int8(tmp_path: Path) -> None:
    """A scale for every output, one for the input; the scale before quantization is 1, since it is in the weights."""
    source, found = write(tmp_path, scheme="int8-smooth")
    for name, parts in {"attention.qkv": QKV, **{name: (f"{LAYER}{part}",) for name, part in NAMES.items()}}.items():
        weight, module = joined(source, parts), f"transformer.layers.1.{name}"
        scale = np.abs(weight).max(1) / np.float32(127)
        quantized, factor = found[f"{module}.weight"], found[f"{module}.weights_scaling_factor"]
        assert quantized.dtype == np.int8 and factor.dtype == np.float32
        assert np.array_equal(factor, scale)
        assert np.abs(quantized * factor[:, None] - weight).max() <= scale.max() / 2 * 1.001
        ones = found[f"{module}.prequant_scaling_factor"]
        assert ones.dtype == BF16 and ones.shape == weight.shape[1:] and (ones == 1).all()
    inputs = [
        found[f"transformer.layers.1.{name}.activation_scaling_factor"]
        for name in ("attention.qkv", "mlp.fc", "mlp.gate")
    ]
    assert [factor.tolist() for factor in inputs] == [[np.float32(largest / 127)] for largest in (10, 13, 13)]


def test_w8a16_is_quantized_by_tensorrt_llm(tmp_path: Path) -> None:
    """It quantizes and reorders 16-bit weights when it builds, and takes 8-bit ones as reordered already."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "w8a16").mkdir()
    _, plain = write(tmp_path / "plain")
    _, found = write(tmp_path / "w8a16", scheme="w8a16")
    assert plain.keys() == found.keys() and all(np.array_equal(plain[name], found[name]) for name in plain)


def test_w4a16(tmp_path: Path) -> None:
    """Two outputs in a byte, the even one in the lower half; a scale for 128 inputs of an output."""
    source, found = write(tmp_path, scheme="w4a16")
    quantizer = Quantizer(dtype="int4", per="group", group_size=128, bf16_scales=True)
    for name, parts in {"attention.qkv": QKV, **{name: (f"{LAYER}{part}",) for name, part in NAMES.items()}}.items():
        weight, module = joined(source, parts), f"transformer.layers.1.{name}"
        out, inner = weight.shape
        packed, scale = found[f"{module}.weight"], found[f"{module}.weights_scaling_factor"]
        assert packed.dtype == np.int8 and packed.shape == (out // 2, inner)
        assert scale.dtype == BF16 and scale.shape == (out, inner // 128)
        unpacked = np.empty((out, inner), np.int8)
        unpacked[0::2], unpacked[1::2] = np.left_shift(packed, 4) >> 4, packed >> 4
        assert np.array_equal(unpacked * scale.astype(np.float32).repeat(128, 1), quantizer.fake_quantize(weight.T).T)
        assert not any(f"{module}.{kind}" in found for kind in ("prequant_scaling_factor", "activation_scaling_factor"))


def test_linears_that_are_excluded(tmp_path: Path) -> None:
    amax = {name: 1.0 for name in linears() if not name.startswith("language_model.layers.0.mlp")}
    source, found = write(tmp_path, scheme="fp8", amax=amax)
    assert {name for name in found if "scaling_factor" in name and ".0.mlp" in name} == set()
    gate = source.read("language_model.layers.0.mlp.gate_proj.weight")
    assert np.array_equal(found["transformer.layers.0.mlp.fc.weight"], gate.astype(BF16))
    assert found["transformer.layers.0.attention.qkv.weight"].dtype == E4M3


def test_a_scheme_without_linears_is_none(tmp_path: Path) -> None:
    _, found = write(tmp_path, scheme="fp8", amax={})
    assert {value.dtype for value in found.values()} == {BF16}


def test_zeros_have_scale_1(tmp_path: Path) -> None:
    settings = language_settings(scheme="fp8", amax=dict.fromkeys(linears(), 0.0))
    source = Tensors({name: np.zeros_like(value) for name, value in language_weights(settings).tensors.items()})
    write_checkpoint(settings, source, tmp_path)
    found = stored(tmp_path / "rank0.safetensors")
    assert all((value == 1).all() for name, value in found.items() if "scaling_factor" in name)
