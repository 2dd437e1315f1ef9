"""How vLLM is started: the limits that a bundle states beside the text encoder, and vLLM's arguments from them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from qie.engines.errors import BundleError, first_line
from qie.engines.records import Range, from_plain

__all__ = ["SETTINGS_FILE", "TASK", "VllmSettings", "arguments", "flags", "read_settings"]

SETTINGS_FILE = "qie.json"
"""Name of the file of ``VllmSettings``."""

TASK = "token_embed"
"""vLLM's task that returns the hidden states of all tokens."""

LARGEST = 1 << 16
"""Bytes of the file; it has some hundred."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings:
    """What a session needs to know of a text encoder.

    Attributes:
        positions: tokens of the longest prompt, the template's prefix included.
        images: images of a prompt; 0 where vLLM takes only embeddings of images, and loads no vision tower.
        cache_bytes: size of the key-value cache.
        image_token_id: token that stands for an image.
        merge_size: side in patches of the square that becomes one token.
    """

    positions: Annotated[int, Range(1, 1 << 20)]
    images: Annotated[int, Range(0, 1000)]
    cache_bytes: Annotated[int, Range(1, 1 << 50)]
    image_token_id: Annotated[int, Range(0, 1 << 31)]
    merge_size: Annotated[int, Range(1, 64)]

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_settings(path: Path) -> VllmSettings:
    """Read the file ``path``.

    Raises:
        BundleError: it cannot be read or is another file.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = from_plain(VllmSettings, content)
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise BundleError(
            f"{path} does not say how vLLM runs the text encoder ({first_line(problem)}); build the bundle again with "
            "`qie build`"
        ) from problem
    return settings


def arguments(settings: VllmSettings, dtype: str, *, images: int | None = None) -> dict[str, Any]:
    """The arguments of vLLM's class ``LLM`` for one prompt at a time, whose every hidden state is returned.

    A prompt is computed in one piece (no chunks) and from its beginning (no prefix cache), so that the hidden states of
    all its tokens are there. No CUDA graphs are captured: a prompt has its own length.

    Args:
        settings: of the text encoder.
        dtype: in which vLLM computes.
        images: of a prompt, with a vision tower; 0 without one; None for those of ``settings``.
    """
    return {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"task": TASK, "use_activation": False},
        "dtype": dtype,
        "max_model_len": settings.positions,
        "max_num_batched_tokens": settings.positions,
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": settings.cache_bytes,
        "limit_mm_per_prompt": {"image": settings.images if images is None else images, "video": 0},
        "enable_mm_embeds": True,
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "mm_device_do_normalize": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
    }


def flags(values: dict[str, Any]) -> list[str]:
    """``values``, arguments of ``LLM``, as flags of vLLM's server, a word each."""
    words: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
