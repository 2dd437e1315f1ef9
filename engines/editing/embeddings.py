"""Images and prompts to embeddings: by the engines, or from a cache where they were computed before.

Shape suffixes: V image tokens of the prompt, L text tokens, D width of the language model.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qie.engines.editing.encoder_cache import EncoderCache, EncoderKey
from qie.engines.editing.meter import Meter
from qie.engines.editing.stages import Stages
from qie.engines.inputs.feeds import Feed, language_feed, vision_feed
from qie.engines.inputs.prompt import PREFIX_TOKENS, PromptTokens
from qie.engines.inputs.vision import VisionInputs

__all__ = ["prompt_embeds"]

Float32 = NDArray[np.float32]

_NO_EMBEDS = np.empty((0, 0), np.float32)


def prompt_embeds(
    stages: Stages,
    vision: VisionInputs,
    prompts: Sequence[PromptTokens],
    *,
    meter: Meter,
    cache: EncoderCache | None = None,
) -> list[Float32]:
    """Prompt embeddings float32 [B, L, D] of each of ``prompts``, which are batches about the same images.

    The bytes are the same with and without a cache: every prompt is a run of its own. A stage that is not needed is
    neither loaded nor metered. Prompts that a server embeds are not cached: it may have other weights the next time.

    Args:
        stages: the engines.
        vision: the images.
        prompts: their prompts.
        meter: of the edit.
        cache: gives what was computed before and keeps what is computed now; equal prompts run once, and the arrays
            are read-only. None, or one that keeps nothing, runs everything.

    Raises:
        BackendMissingError, BundleError: an engine cannot be loaded.
        EngineError: a backend failed or memory ran out.
    """
    if cache is None or not cache.keeps or stages.identity("vision") is None:
        with meter("vision") as report:
            image_embeds_VD = stages.vision(vision, progress=report)
        with meter("language") as report:
            return stages.language(prompts, image_embeds_VD, progress=report)

    image_key = _image_key(stages, vision)
    if stages.identity("language") is None:
        image_embeds_VD = _image_embeds(stages, vision, image_key, meter, cache)
        with meter("language") as report:
            return stages.language(prompts, image_embeds_VD, progress=report)
    keys = [_prompt_key(stages, image_key, tokens) for tokens in prompts]
    found: dict[EncoderKey, Float32] = {}
    missing: dict[EncoderKey, PromptTokens] = {}
    (prompt_spec,) = stages.engines["language"][-1].outputs
    for key, tokens in dict(zip(keys, prompts, strict=True)).items():
        batch, length = tokens.input_ids.shape
        sizes = {"batch": batch, "text_tokens": length - PREFIX_TOKENS}
        embeds_BLD = _loaded(cache, key, prompt_spec.shape(sizes))
        if embeds_BLD is None:
            missing[key] = tokens
        else:
            found[key] = embeds_BLD
    if missing:
        image_embeds_VD = _image_embeds(stages, vision, image_key, meter, cache)
        with meter("language") as report:
            computed = stages.language(list(missing.values()), image_embeds_VD, progress=report)
            found |= {key: cache.store(key, array) for key, array in zip(missing, computed, strict=True)}
    return [found[key] for key in keys]


def _image_embeds(stages: Stages, vision: VisionInputs, key: EncoderKey, meter: Meter, cache: EncoderCache) -> Float32:
    """Image embeddings float32 [V, D] from the cache, or from the engine and then in the cache."""
    (image_spec,) = stages.engines["vision"][-1].outputs
    cached_VD = _loaded(cache, key, image_spec.shape({"image_tokens": len(vision.raster_index)}))
    if cached_VD is None:
        with meter("vision") as report:
            cached_VD = cache.store(key, stages.vision(vision, progress=report))
    return cached_VD


def _loaded(cache: EncoderCache, key: EncoderKey, shape: tuple[int, ...]) -> Float32 | None:
    """The entry of ``key`` where it has the shape that its inputs lead to."""
    entry = cache.load(key)
    return entry if entry is not None and entry.shape == shape else None


def _image_key(stages: Stages, vision: VisionInputs) -> EncoderKey:
    """The key of the image embeddings: the engine and everything that it reads."""
    return EncoderKey(
        engine=stages.engines["vision"][0].key,
        digest=_digest(["vision", str(stages.identity("vision"))], vision_feed(vision)),
    )


def _prompt_key(stages: Stages, image_key: EncoderKey, tokens: PromptTokens) -> EncoderKey:
    """The key of prompt embeddings: the engine and everything that it reads, image embeddings by their own key."""
    feed = language_feed(tokens, _NO_EMBEDS)
    del feed["image_embeds"]
    return EncoderKey(
        engine=stages.engines["language"][0].key,
        digest=_digest(["language", str(stages.identity("language")), image_key.digest], feed),
    )


def _digest(texts: Sequence[str], feed: Feed) -> str:
    """sha256 of texts and arrays, each behind its length, so that no two lists of them are hashed alike."""
    digest = hashlib.sha256()
    for text in texts:
        _update(digest, text.encode())
    for name, array in feed.items():
        _update(digest, f"{name} {array.dtype.str} {array.shape}".encode())
        _update(digest, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", field: bytes | memoryview) -> None:
    digest.update(len(field).to_bytes(8, "little"))
    digest.update(field)
