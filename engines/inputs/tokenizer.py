"""The tokenizer of a bundle or checkpoint: byte-pair encoding that splits text as Qwen's does, and nothing else.

A tokenizer file may describe other steps, whose time and memory nobody bounds: such a file is refused.
"""

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

__all__ = ["WORDS", "load_tokenizer"]

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen splits text before byte-pair encoding (transformers, models/qwen2/tokenization_qwen2.py)."""

_LONGEST = 1 << 26
"""Bytes of a tokenizer.json; that of Qwen2.5-VL has 11 MB."""

_BPE_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
                "ignore_merges")  # fmt: skip
"""Options that Qwen's model does not set."""

_NORMALIZER = {"type": "NFC"}
_SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def load_tokenizer(content: bytes) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json, without truncation and padding.

    Raises:
        ValueError: it is damaged, or normalizes or splits text in another way than Qwen's.
    """
    if len(content) > _LONGEST:
        raise ValueError(f"{len(content):,} bytes, expected at most {_LONGEST:,}")
    try:
        tokenizer = Tokenizer.from_buffer(content)
        normalizer, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    except (
        BaseException
    ) as problem:  # the library raises nothing more precise, and pyo3's PanicException is no Exception
        if isinstance(problem, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ValueError(str(problem)) from None
    model = tokenizer.model
    options = [getattr(model, option, None) for option in _BPE_OPTIONS]
    if not isinstance(model, BPE) or any(options):
        raise ValueError(f"its model is {type(model).__name__} with options, expected plain byte-pair encoding")
    if normalizer not in (None, _NORMALIZER):
        raise ValueError(f"its normalizer is {_name(normalizer)}, expected NFC")
    steps = splitter.get("pretokenizers", []) if isinstance(splitter, dict) else []
    if [{key: step[key] for key in step if key != "trim_offsets"} for step in steps] != [_SPLIT, _BYTES]:
        raise ValueError(f"its pre-tokenizer is {_name(splitter)}, expected the split of Qwen2")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    letters = len(tokenizer.encode("a", add_special_tokens=False).ids)
    if letters > 1:
        raise ValueError(f"it makes {letters} tokens of one letter")
    return tokenizer


def _state(step: Any) -> Any:
    """A step of the tokenizer as in its file; None where there is none."""
    return None if step is None else json.loads(step.__getstate__())


def _name(state: Any) -> str:
    return str(state.get("type")) if isinstance(state, dict) else "missing"
