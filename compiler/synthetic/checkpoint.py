"""A checkpoint of the real architecture with random weights, in diffusers format and of any size.

It loads in diffusers and transformers like the published checkpoints, so every graph can be checked against them
without a download; its edits are noise. ``python -m qie.compiler.synthetic.checkpoint OUT`` writes one.

Weights depend only on the seed and the tensor's name, and come from raw PCG64 bits, so equal arguments give equal
bytes. Their scales keep activations near 1 at any depth, and every parameter affects the output: norms are spread
around 1, biases are not zero, the temporal slices of a kernel differ.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qie.compiler.checkpoint.model import PIPELINES
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.synthetic.architecture import ARCHITECTURES, Architecture, Shape, tensor_shapes
from qie.compiler.synthetic.tokenizer import json_text, small_tokenizer, tokenizer_files
from qie.compiler.weights.weight import DType
from qie.engines.errors import CheckpointError

__all__ = ["ARCHITECTURES", "Architecture", "tensor_shapes", "write_checkpoint"]

_COMPONENTS = {
    "processor": ("transformers", "Qwen2VLProcessor"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
}

_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""As published (scheduler/scheduler_config.json of Qwen-Image-Edit)."""

_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Per latent channel, of the published VAE (diffusers autoencoder_kl_qwenimage.py)."""

_IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}
"""As published (processor/preprocessor_config.json of Qwen-Image-Edit), without the patch size."""

_ABOUT = "the weights are random, so an edit shows that everything runs, but only noise"

_GAINS = {
    "timestep_embedder.linear_1": 2.0,
    "timestep_embedder.linear_2": 2.0,
    "attn.to_out.0": 2.0,
    "attn.to_add_out": 2.0,
    "norm_out.linear": 0.5,
    "self_attn.o_proj": 0.5,
    "mlp.down_proj": 0.5,
    "encoder.conv_out": 2.5,
    "post_quant_conv": 0.5,
    "decoder.conv_out": 0.4,
}
"""End of a layer's name -> standard deviation of its output for inputs of standard deviation 1; 1 for all others."""


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: DType = "float32",
    weights: bool = True,
    shard_bytes: int | None = None,
    words: str = "",
) -> Path:
    """Write a diffusers checkpoint, complete or not at all; one tensor is in memory at a time.

    Args:
        folder: the folder to write; it must not exist, or be empty.
        architecture: the sizes.
        seed: seed of the weights.
        dtype: dtype of the weights.
        weights: False leaves out the safetensors files.
        shard_bytes: splits transformer and text encoder into shards of at most this size (or one tensor), with an
            index; None writes one file each.
        words: text that the vocabulary encodes in few tokens.

    Returns:
        ``folder``.

    Raises:
        CheckpointError: ``folder`` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; delete it or choose another one")
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        for path, content in _files(architecture, words).items():
            (partial / path).parent.mkdir(exist_ok=True)
            (partial / path).write_text(content, encoding="utf-8")
        for subfolder in tensor_shapes(architecture) if weights else ():
            limit = None if subfolder == "vae" else shard_bytes
            _write_weights(partial / subfolder, subfolder, architecture, seed=seed, dtype=dtype, shard_bytes=limit)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_weights(
    folder: Path, subfolder: Subfolder, architecture: Architecture, *, seed: int, dtype: DType, shard_bytes: int | None
) -> None:
    shapes = tensor_shapes(architecture)[subfolder]
    stored_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "<f4")
    sizes = {name: stored_dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    shards = _split(sizes, shard_bytes)
    stem = "model" if subfolder == "text_encoder" else "diffusion_pytorch_model"
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            stored = _stored_name(subfolder, name, architecture)
            st_dtype = "BF16" if dtype == "bfloat16" else "F32"
            header[stored] = {"dtype": st_dtype, "shape": shapes[name], "data_offsets": (start, end)}
            weight_map[stored] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                stream.write(_values(subfolder, name, shapes[name], seed).astype(stored_dtype).tobytes())
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json_text(index), encoding="utf-8")


def _split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """The names in order, in lists whose sizes stay within ``limit``."""
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, size in sizes.items():
        if limit is not None and shards[-1] and shard_size + size > limit:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    return shards


def _stored_name(subfolder: Subfolder, name: str, architecture: Architecture) -> str:
    if subfolder != "text_encoder" or name == "lm_head.weight":
        return name
    return f"model.{name}" if architecture.text_names == "new" else name.replace("language_model.", "model.", 1)


def _values(subfolder: Subfolder, name: str, shape: Shape, seed: int) -> NDArray[np.float32]:
    """One tensor: uniformly distributed, with center and standard deviation by the kind of parameter."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {subfolder} {name}".encode()).digest())
    count = math.prod(shape)
    bits = np.random.PCG64(key).random_raw((count + 1) // 2).astype("<u8").view("<u4")[:count]
    values = bits.astype(np.float32)
    values *= np.float32(2 * math.sqrt(3) / 2**32)
    values -= np.float32(math.sqrt(3))
    layer, _, kind = name.rpartition(".")
    center, std = 0.0, 1.0
    if kind == "bias":
        std = 0.1
    elif kind == "gamma" or len(shape) == 1:
        center, std = 1.0, 0.2
    elif not name.endswith("embed_tokens.weight"):
        fan_in = math.prod((shape[1], *shape[-2:]) if subfolder == "vae" else shape[1:])
        std = next((gain for end, gain in _GAINS.items() if layer.endswith(end)), 1.0) / math.sqrt(fan_in)
    values *= np.float32(std)
    values += np.float32(center)
    return values.reshape(shape)


def _files(a: Architecture, words: str) -> dict[str, str]:
    """All files of the checkpoint except weights: path -> text."""
    tokenizer = small_tokenizer(words)
    vocabulary = tokenizer_files(tokenizer)
    pipeline = {
        "_class_name": next(name for name, pipeline in PIPELINES.items() if pipeline == a.pipeline),
        "_diffusers_version": "0.36.0",
        "_qie": {
            "vae_area": a.vae_area,
            "condition_area": a.condition_area,
            "about": _ABOUT,
            **({"schedule": {"steps": a.schedule[0], "guidance": a.schedule[1]}} if a.schedule else {}),
        },
        **_COMPONENTS,
    }
    return {
        "model_index.json": json_text(pipeline),
        "scheduler/scheduler_config.json": json_text(_SCHEDULER),
        "transformer/config.json": json_text(_transformer_config(a)),
        "text_encoder/config.json": json_text(_text_encoder_config(a, tokenizer)),
        "vae/config.json": json_text(_vae_config(a)),
        "processor/preprocessor_config.json": json_text({**_IMAGE_PROCESSOR, "patch_size": a.vision_patch_size}),
        "processor/tokenizer.json": tokenizer.to_str(pretty=True),
        **{f"{folder}/{file}": text for folder in ("tokenizer", "processor") for file, text in vocabulary.items()},
    }


def _transformer_config(a: Architecture) -> dict[str, Any]:
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": a.attention_head_dim,
        "axes_dims_rope": a.axes_dims_rope,
        "guidance_embeds": False,
        "in_channels": a.in_channels,
        "joint_attention_dim": a.text_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_layers": a.num_layers,
        "out_channels": a.out_channels,
        "patch_size": 2,
        **({"zero_cond_t": True} if a.zero_cond_t else {}),
    }


def _text_encoder_config(a: Architecture, tokenizer: Tokenizer) -> dict[str, Any]:
    decoder = {
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": a.text_hidden_size,
        "intermediate_size": a.text_intermediate_size,
        "max_position_embeddings": 128000,
        "max_window_layers": a.text_layers,
        "num_attention_heads": a.text_heads,
        "num_hidden_layers": a.text_layers,
        "num_key_value_heads": a.text_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": a.text_mrope_section, "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "vocab_size": a.text_vocab_size,
    }
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "depth": a.vision_depth,
        "fullatt_block_indexes": a.vision_fullatt_block_indexes,
        "hidden_act": "silu",
        "hidden_size": a.vision_hidden_size,
        "in_channels": 3,
        "intermediate_size": a.vision_intermediate_size,
        "num_heads": a.vision_heads,
        "out_hidden_size": a.text_hidden_size,
        "patch_size": a.vision_patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": a.vision_window_size,
    }
    tokens = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **decoder,
        "text_config": {"model_type": "qwen2_5_vl_text", **decoder},
        "vision_config": vision,
        **{key: tokenizer.token_to_id(f"<|{token}|>") for key, token in zip(keys, tokens, strict=True)},
        "tie_word_embeddings": False,
    }


def _vae_config(a: Architecture) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "attn_scales": (),
        "base_dim": a.vae_base_dim,
        "dim_mult": a.vae_dim_mult,
        "dropout": 0.0,
        "latents_mean": _LATENTS_MEAN[: a.vae_z_dim],
        "latents_std": _LATENTS_STD[: a.vae_z_dim],
        "num_res_blocks": a.vae_num_res_blocks,
        "temperal_downsample": a.vae_temperal_downsample,
        "z_dim": a.vae_z_dim,
    }


def main() -> None:
    """Write a checkpoint with random weights."""
    parser = argparse.ArgumentParser(prog="python -m qie.compiler.synthetic.checkpoint", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="demo", help="sizes, default: demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, default: 0")
    parser.add_argument("--no-weights", action="store_true", help="write configs and tokenizer only")
    arguments = parser.parse_args()
    try:
        folder = write_checkpoint(
            arguments.out,
            ARCHITECTURES[arguments.architecture],
            seed=arguments.seed,
            weights=not arguments.no_weights,
        )
    except CheckpointError as error:
        parser.error(str(error))
    print(f"Wrote a random checkpoint ({arguments.architecture}, seed {arguments.seed}) to {folder}")


if __name__ == "__main__":
    main()
