"""A checkpoint of a few small files, for what opens and reads checkpoints."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

__all__ = ["FILES", "INDEX", "SHARDS", "TRANSFORMER", "write_json", "write_shards", "write_small_checkpoint"]

BF16 = np.dtype(ml_dtypes.bfloat16)
FILES = {
    "transformer/config.json": {
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "in_channels": 64,
        "joint_attention_dim": 8,
        "axes_dims_rope": [2, 2, 4],
    },
    "text_encoder/config.json": {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 8,
        "vocab_size": 5,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [1, 1, 2]},
        "image_token_id": 4,
        "vision_config": {
            "depth": 1,
            "hidden_size": 8,
            "num_heads": 1,
            "intermediate_size": 8,
            "out_hidden_size": 8,
            "patch_size": 14,
            "fullatt_block_indexes": [0],
        },
    },
    "vae/config.json": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    "scheduler/scheduler_config.json": {"shift": 1.5},
    "processor/preprocessor_config.json": {"patch_size": 14},
    "tokenizer/vocab.json": {"a": 0},
}
TRANSFORMER = {"img_in.weight": np.arange(12).reshape(3, 4).astype(BF16), "img_in.bias": np.arange(3).astype(BF16)}
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "visual.patch_embed.proj.weight": np.ones((2, 3), np.float32),
        "model.embed_tokens.weight": np.full((5, 2), 2, np.float32),
    },
    "model-00002-of-00002.safetensors": {
        "model.layers.0.mlp.up_proj.weight": np.full((4, 2), 3, np.float16),
        "lm_head.weight": np.full((5, 2), 4, np.float32),
    },
}
INDEX = "model.safetensors.index.json"


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_json(folder / INDEX, {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}})


def write_small_checkpoint(root: Path) -> Path:
    """Write a checkpoint whose text encoder is sharded."""
    write_json(root / "model_index.json", {"_class_name": "QwenImageEditPlusPipeline"})
    for name, content in FILES.items():
        write_json(root / name, content)
    (root / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    save_file(TRANSFORMER, root / "transformer/diffusion_pytorch_model.safetensors")
    write_shards(root / "text_encoder", SHARDS)
    save_file({"quant_conv.bias": np.zeros(2, np.float32)}, root / "vae/diffusion_pytorch_model.safetensors")
    return root
