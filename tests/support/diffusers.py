"""What diffusers does in functions that it keeps private, for the tests that compare with exactly them."""

from typing import Any

import diffusers
from diffusers.loaders import lora_conversion_utils

__all__ = ["convert_lora", "pack_latents", "prompt_embeds"]


def pack_latents(latents: Any, batch: int, channels: int, height: int, width: int) -> Any:
    """Latents [B, C, H, W] as tokens [B, H W / 4, 4 C] (pipelines/qwenimage/pipeline_qwenimage_edit_plus.py)."""
    return diffusers.QwenImageEditPlusPipeline._pack_latents(latents, batch, channels, height, width)


def prompt_embeds(pipeline: Any, *arguments: Any) -> Any:
    """The prompt embeddings that a pipeline computes of instruction and images."""
    return pipeline._get_qwen_prompt_embeds(*arguments)


def convert_lora(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a LoRA in another naming as diffusers names them (loaders/lora_conversion_utils.py)."""
    return lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers(tensors)
