"""The small files of a text encoder: configs of model, tokenizer and image processor, as transformers 5 reads them."""

import json
import shlex
from typing import Any

from tokenizers import Tokenizer

from qie.compiler.backends.vllm.settings import Settings
from qie.engines.sessions.vllm.settings import SETTINGS_FILE, VllmSettings, arguments, flags

__all__ = ["SCRIPT", "SMALL_FILES", "TEMPLATE", "TEMPLATE_FILE", "files"]

SCRIPT = "serve.sh"
"""Name of the script that starts a server."""

TEMPLATE_FILE = "chat_template.jinja"

SMALL_FILES = (
    SETTINGS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    TEMPLATE_FILE,
    SCRIPT,
    "config.json",
)
"""Names of the files, in the order in which they are written."""

TEMPLATE = (
    "{%- for message in messages -%}{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- else -%}<|image_pad|>"
    "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
)
"""A chat template that adds nothing: vLLM's server takes embeddings of images only in messages of a chat."""

POSITIONS = 128_000
"""``max_position_embeddings`` of Qwen2.5-VL; the shapes of a recipe are the limit."""

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}
"""Keys of config.json -> the special tokens that they name."""


def files(settings: Settings, tokenizer: Tokenizer) -> dict[str, str]:
    """The content of every small file by name, ``SMALL_FILES``.

    Args:
        settings: of the text encoder.
        tokenizer: of the checkpoint.
    """
    limits = VllmSettings(
        positions=settings.positions,
        images=settings.images,
        cache_bytes=settings.cache_bytes,
        image_token_id=settings.model.image_token_id,
        merge_size=settings.model.processor.merge_size,
    )
    texts = (
        limits.text(),
        tokenizer.to_str(pretty=False),
        _json(_tokenizer_config()),
        _json(_preprocessor_config(settings)),
        TEMPLATE,
        _script(limits, settings.dtype),
        _json(_model_config(settings, tokenizer)),
    )
    return dict(zip(SMALL_FILES, texts, strict=True))


def _model_config(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Transformers' ``Qwen2_5_VLConfig``. Embeddings are tied, so that no head is stored, which nothing computes."""
    tokens = {key: tokenizer.token_to_id(token) for key, token in _TOKENS.items()}
    tokens = {key: token for key, token in tokens.items() if token is not None}
    tokens["image_token_id"] = settings.model.image_token_id
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": settings.dtype,
        "tie_word_embeddings": True,
        **tokens,
        "text_config": {**_language_config(settings), **{k: v for k, v in tokens.items() if k[:3] in ("bos", "eos")}},
        "vision_config": _vision_config(settings),
    }


def _language_config(settings: Settings) -> dict[str, Any]:
    language = settings.model.language
    rope = {
        "rope_type": "default",
        "type": "default",
        "mrope_section": list(language.mrope_section),
        "rope_theta": language.rope_theta,
    }
    return {
        "model_type": "qwen2_5_vl_text",
        "dtype": settings.dtype,
        "hidden_size": language.width,
        "intermediate_size": language.intermediate,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "vocab_size": language.vocabulary,
        "rms_norm_eps": language.eps,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "use_sliding_window": False,
        "rope_theta": language.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
    }


def _vision_config(settings: Settings) -> dict[str, Any]:
    vision, processor = settings.model.vision, settings.model.processor
    return {
        "model_type": "qwen2_5_vl_vision",
        "depth": vision.depth,
        "hidden_size": vision.width,
        "intermediate_size": vision.intermediate,
        "num_heads": vision.heads,
        "out_hidden_size": vision.out_width,
        "fullatt_block_indexes": list(vision.full_attention_blocks),
        "hidden_act": "silu",
        "in_channels": 3,
        "patch_size": processor.patch_size,
        "spatial_merge_size": processor.merge_size,
        "temporal_patch_size": processor.temporal_patch_size,
        "window_size": processor.window_size,
    }


def _preprocessor_config(settings: Settings) -> dict[str, Any]:
    processor = settings.model.processor
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "min_pixels": processor.min_pixels,
        "max_pixels": processor.max_pixels,
        "size": {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        "patch_size": processor.patch_size,
        "merge_size": processor.merge_size,
        "temporal_patch_size": processor.temporal_patch_size,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _script(limits: VllmSettings, dtype: str) -> str:
    """A server that takes embeddings of images, without a vision tower."""
    words = flags(arguments(limits, dtype, images=0) | {"chat_template_content_format": "openai"})
    lines = [
        "#!/bin/sh",
        "# Starts vLLM's server for the language model; arguments such as --port 8000 are added to its own.",
        'folder=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit',
        'exec "${PYTHON:-python3}" -m vllm.entrypoints.openai.api_server --model "$folder" --served-model-name qie \\',
        f'    --chat-template "$folder/{TEMPLATE_FILE}" \\',
        *(f"    {line} \\" for line in _lines(words)),
        '    "$@"',
    ]
    return "\n".join([*lines, ""])


def _lines(words: list[str]) -> list[str]:
    """A flag and its value a line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return lines


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
