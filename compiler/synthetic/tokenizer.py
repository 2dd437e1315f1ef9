"""A small byte-pair tokenizer like Qwen's: its special tokens and pre-tokenizer, with a vocabulary of its own."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from qie.compiler.checkpoint.tokenizer import byte_level
from qie.engines.inputs.prompt import PREFIX

__all__ = ["json_text", "small_tokenizer", "tokenizer_files"]

_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""The special tokens of Qwen2.5-VL in their order; their ids follow the byte-pair vocabulary."""

_VOCABULARY_TEXT = (
    f"{PREFIX}Picture 1: <|vision_start|>"
    "Make the sky red, blue, green, yellow, black and white. Replace the cat with a dog. Add a hat, a house, a tree, "
    "some flowers and snow. Remove people from this photo. Change it into night, winter or pencil sketch style. "
    "Turn her left hand around, put glasses on his face, keep everything else unchanged and brighten those mountains."
    "<|im_end|>\n<|im_start|>assistant\n"
)
"""Each of its words becomes one token, so ``PREFIX`` has 64 tokens as with the published vocabulary. Other text is
split into smaller tokens, down to bytes."""


def small_tokenizer(words: str = "") -> Tokenizer:
    """A byte-level tokenizer like Qwen's that encodes the template and ``words`` in few tokens."""
    tokenizer = byte_level(BPE())
    trainer = trainers.BpeTrainer(
        min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(re.split(r"<\|\w+\|>", _VOCABULARY_TEXT + words), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL_TOKENS])
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files that transformers' Qwen2Tokenizer reads: name -> text."""
    model = json.loads(tokenizer.to_str())["model"]
    ids = {token: tokenizer.token_to_id(token) for token in _SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": _SPECIAL_TOKENS[1:]}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {id_: {"content": token, **flags} for token, id_ in ids.items()},
        "bos_token": None,
        "unk_token": None,
        **roles,
        "model_max_length": 131072,
    }
    return {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
        "tokenizer_config.json": json_text(config),
        "added_tokens.json": json_text(ids),
        "special_tokens_map.json": json_text(roles),
    }


def json_text(content: Mapping[str, Any]) -> str:
    """``content`` as JSON in the form that transformers and diffusers write."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
