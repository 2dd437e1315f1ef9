"""Prompts as the text encoder reads them, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from pocket.data.examples import Example, Mention
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.engines.bundle.specs import Areas, PromptSpec
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.vision import smart_resize

__all__ = ["PromptBatch", "PromptTokenizer"]

PROMPT_TOKENS = {1: 120, 2: 136}
"""Number of images -> length to which prompts are padded; few lengths mean few compilations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """B prompts of I images each, padded on the right to S tokens.

    Attributes:
        images: uint8 [B, I, H, W, 3], resized for the vision tower.
        input_ids: int64 [B, S].
        position_ids: int64 [3, B, S].
        mask: int64 [B, S], 1 for real tokens.
        mention_index: int64 [M, 2], prompt and token of each of ``mentions``.
        mentions: the mentions of all texts.
    """

    images: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    mention_index: Tensor
    mentions: tuple[Mention, ...]


class PromptTokenizer:
    """Turns examples into prompts, with the tokenizer in the folder ``configs``."""

    def __init__(self, configs: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(configs / "processor" / "tokenizer.json"))
        image_token = self.tokenizer.token_to_id("<|image_pad|>")
        self.end_token = self.tokenizer.token_to_id("<|im_end|>")
        self.spec = PromptSpec(pipeline="edit_plus", image_token_id=image_token, merge_size=2)

    def batch(self, examples: Sequence[Example]) -> PromptBatch:
        """The prompts of examples with the same number of images, all of one size."""
        count = len(examples[0].images)
        images = np.stack([resize_for_vision(image) for example in examples for image in example.images])
        grids = [(1, images.shape[1] // 14, images.shape[2] // 14)] * count
        prompts = [encode(self.tokenizer, [e.text], grids, self.spec, allow_blank=True) for e in examples]
        shape = (len(prompts), PROMPT_TOKENS[count])
        input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        position_ids = torch.zeros(3, *shape, dtype=torch.long)
        mention_index, mentions = [], []
        for row, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
            length = prompt.lengths[0]
            text_end = int(np.flatnonzero(prompt.input_ids[0] == self.end_token)[-1])
            text_start = text_end - self._count(example.text)
            for mention in example.mentions:
                mention_index.append((row, text_start + self._count(example.text[: mention.end]) - 1))
                mentions.append(mention)
            input_ids[row, :length] = torch.from_numpy(prompt.input_ids[0])
            position_ids[:, row, :length] = torch.from_numpy(prompt.position_ids[:, 0])
            mask[row, :length] = 1
        return PromptBatch(
            images=torch.from_numpy(images.reshape(len(examples), count, *images.shape[1:])),
            input_ids=input_ids,
            position_ids=position_ids,
            mask=mask,
            mention_index=torch.tensor(mention_index, dtype=torch.long).reshape(-1, 2),
            mentions=tuple(mentions),
        )

    def _count(self, text: str) -> int:
        """Number of tokens of ``text``."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


def resize_for_vision(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image after the resizing of the pipeline and that of the image processor, in this order."""
    a = ARCHITECTURES["pocket"]
    small = prepare(Image.fromarray(image), Areas(vae_area=a.vae_area, condition_area=a.condition_area)).vision
    height, width = smart_resize(small.height, small.width, factor=28, min_pixels=3136, max_pixels=12845056)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
