"""The prompt of an edit: the template around the instruction, its tokens, and the places of image embeddings.

Shape suffixes: B instructions, S tokens of the longest prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import PromptSpec
from qie.engines.errors import ImageError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "PREFIX",
    "PREFIX_TOKENS",
    "SYSTEM",
    "PromptTokens",
    "encode",
]

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
"""The system prompt (diffusers pipeline_qwenimage_edit.py and _edit_plus.py, prompt_template_encode)."""

PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
"""The fixed beginning of every prompt, the same for both pipelines."""

PREFIX_TOKENS = 64
"""Tokens of PREFIX in Qwen's vocabulary; their embeddings are dropped (prompt_template_encode_start_idx)."""

_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
_IMAGE_PAD = "<|image_pad|>"
_IMAGE_TEMPLATES = {
    "edit": "<|vision_start|>{pads}<|vision_end|>",
    "edit_plus": "Picture {number}: <|vision_start|>{pads}<|vision_end|>",
}
"""Pipeline -> text of one image (prompt_template_encode and img_prompt_template of the two pipelines)."""

_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", _IMAGE_PAD, "<|video_pad|>")


LONGEST_TOKEN = 256
"""Characters that a token may have: the longest of Qwen's vocabulary has 128 (a run of spaces)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PromptTokens:
    """A batch of prompts about the same images, padded on the right to S tokens.

    Attributes:
        input_ids: int64 [B, S]; padding is 0.
        image_index: int64 [B, S], the row of the image embeddings (of all images, in the image processor's order) that
            takes the token's place; -1 for text and padding.
        position_ids: int64 [3, B, S], frame, height and width positions; padding is 0.
        lengths: tokens of each prompt, its prefix included.
    """

    input_ids: NDArray[np.int64]
    image_index: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    lengths: tuple[int, ...]


def encode(
    tokenizer: "Tokenizer",
    instructions: Sequence[str],
    grids: Sequence[tuple[int, int, int]],
    spec: PromptSpec,
    *,
    allow_blank: bool = False,
) -> PromptTokens:
    """The prompts of several instructions about the same images.

    Special tokens in an instruction are special tokens, as in transformers' processor; vision tokens are refused.

    Args:
        tokenizer: of the checkpoint, with its special tokens.
        instructions: texts of the prompts.
        grids: (frames, height, width) in patches of each image, ``VisionInputs.grids``.
        spec: constants of the model's prompt.
        allow_blank: accept an instruction without a word, such as ``DEFAULT_NEGATIVE``.

    Raises:
        ImageError: the pipeline takes one image, and there are none or several.
        RequestError: an instruction is blank, too long or holds a vision token.
    """
    if spec.pipeline == "edit" and len(grids) != 1:
        raise ImageError(f"{len(grids)} images were given, this model takes 1; use one image or an Edit-Plus model")
    for instruction in instructions:
        _check_instruction(tokenizer, instruction, spec, allow_blank)

    unit = spec.merge_size**2
    images = "".join(
        _IMAGE_TEMPLATES[spec.pipeline].format(number=number, pads=_IMAGE_PAD * (t * h * w // unit))
        for number, (t, h, w) in enumerate(grids, start=1)
    )
    rows = [
        np.array(tokenizer.encode(PREFIX + images + instruction + _SUFFIX, add_special_tokens=False).ids, np.int64)
        for instruction in instructions
    ]
    lengths = tuple(len(ids_S) for ids_S in rows)
    shape = (len(rows), max(lengths))
    input_ids_BS = np.zeros(shape, np.int64)
    image_index_BS = np.full(shape, -1, np.int64)
    position_ids_3BS = np.zeros((3, *shape), np.int64)
    for b, ids_S in enumerate(rows):
        is_image_S = ids_S == spec.image_token_id
        input_ids_BS[b, : len(ids_S)] = ids_S
        image_index_BS[b, : len(ids_S)][is_image_S] = np.arange(is_image_S.sum())
        position_ids_3BS[:, b, : len(ids_S)] = _positions(is_image_S, grids, spec.merge_size)
    return PromptTokens(
        input_ids=input_ids_BS, image_index=image_index_BS, position_ids=position_ids_3BS, lengths=lengths
    )


def _check_instruction(tokenizer: "Tokenizer", instruction: str, spec: PromptSpec, allow_blank: bool) -> None:
    what = "the negative prompt" if allow_blank else "the instruction"
    option = "negative" if allow_blank else "instructions"
    if not instruction.strip() and not allow_blank:
        raise RequestError("the instruction is empty; describe what to change in the image", option=option)
    if len(instruction) > LONGEST_TOKEN * spec.max_instruction_tokens:
        raise RequestError(
            f"{what} has {len(instruction):,} characters, more than {spec.max_instruction_tokens} tokens can have; "
            "shorten it",
            option=option,
        )
    if any("\ud800" <= character <= "\udfff" for character in instruction):
        raise RequestError(f"{what} is not UTF-8 text; write it again", option=option)
    for token in _VISION_TOKENS:
        if token in instruction:
            raise RequestError(f"{what} contains {token}, which marks an image in the prompt; remove it", option=option)
    tokens = len(tokenizer.encode(instruction, add_special_tokens=False).ids)
    if tokens > spec.max_instruction_tokens:
        raise RequestError(
            f"{what} has {tokens} tokens, expected at most {spec.max_instruction_tokens}; shorten it", option=option
        )


def _positions(
    is_image_S: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]], merge_size: int
) -> NDArray[np.int64]:
    """Frame, height and width position of every token of one prompt: int64 [3, S].

    Text advances all three by one per token. An image starts where the text before it ended and spreads over its grid
    of tokens; the text after it continues behind its longer side (transformers modeling_qwen2_5_vl.py,
    ``get_rope_index``).
    """
    remaining = iter(grids)
    position, parts = 0, []
    for run_S in np.split(is_image_S, np.flatnonzero(np.diff(is_image_S)) + 1):
        if run_S[0]:
            frames, height, width = next(remaining)
            size = (frames, height // merge_size, width // merge_size)
            parts.append(position + np.indices(size).reshape(3, -1))
            position += max(size[1:])
        else:
            parts.append(np.tile(position + np.arange(len(run_S)), (3, 1)))
            position += len(run_S)
    return np.concatenate(parts, axis=1)
