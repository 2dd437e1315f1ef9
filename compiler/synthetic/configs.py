"""The files of a synthetic checkpoint beside its weights: configs and tokenizer."""

from typing import Any

from tokenizers import Tokenizer

from qie.compiler.checkpoint.model import PIPELINES
from qie.compiler.synthetic.architecture import Architecture
from qie.compiler.synthetic.tokenizer import json_text, small_tokenizer, tokenizer_files

__all__ = ["config_files"]

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


def config_files(a: Architecture, words: str = "") -> dict[str, str]:
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
