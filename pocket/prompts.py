"""Instructions and pictures as the text encoder reads them, many at once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from pocket.samples import Mark, Sample
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.engines.bundle.specs import Areas, PromptSpec
from qie.engines.inputs.image import prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.vision import smart_resize

__all__ = ["Prompter", "Prompts"]

PROMPT_TOKENS = {1: 120, 2: 136}
"""Pictures -> tokens to which prompts are padded, so that few shapes are compiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """B prompts, padded on the right.

    seen uint8 [B, K, h, w, 3] are the pictures as the vision tower's processor sizes them; input_ids, position_ids and
    mask are [B, S], [3, B, S] and [B, S]. places [N, 2] are prompt and token of the ``marks`` of all texts.
    """

    seen: Tensor
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    places: Tensor
    marks: tuple[Mark, ...]


class Prompter:
    """Makes prompts of samples, with the tokenizer of the checkpoint's ``configs``."""

    def __init__(self, configs: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(configs / "processor" / "tokenizer.json"))
        image_token = self.tokenizer.token_to_id("<|image_pad|>")
        self.end_token = self.tokenizer.token_to_id("<|im_end|>")
        self.spec = PromptSpec(pipeline="edit_plus", image_token_id=image_token, merge_size=2)

    def prompts(self, samples: list[Sample]) -> Prompts:
        """Of samples with as many pictures each, of one size."""
        pictures = len(samples[0].images)
        seen = np.stack([look(image) for s in samples for image in s.images])
        grids = [(1, seen.shape[1] // 14, seen.shape[2] // 14)] * pictures
        rows = [encode(self.tokenizer, [s.text], grids, self.spec, allow_blank=True) for s in samples]
        longest = PROMPT_TOKENS[pictures]
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        positions = torch.zeros(3, len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        places, marks = [], []
        for b, (row, s) in enumerate(zip(rows, samples, strict=True)):
            length = row.lengths[0]
            behind = np.flatnonzero(row.input_ids[0] == self.end_token)[-1]
            for mark in s.marks:
                places.append((b, int(behind) - 1 - self._tokens(s.text) + self._tokens(s.text[: mark.end])))
                marks.append(mark)
            ids[b, :length] = torch.from_numpy(row.input_ids[0])
            positions[:, b, :length] = torch.from_numpy(row.position_ids[:, 0])
            mask[b, :length] = 1
        seen = torch.from_numpy(seen.reshape(len(samples), pictures, *seen.shape[1:]))
        where = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        return Prompts(seen=seen, input_ids=ids, position_ids=positions, mask=mask, places=where, marks=tuple(marks))

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


def look(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture as the pipeline and the processor of the vision tower size it, one after the other."""
    a = ARCHITECTURES["pocket"]
    small = prepare(Image.fromarray(image), Areas(vae_area=a.vae_area, condition_area=a.condition_area)).vision
    height, width = smart_resize(small.height, small.width, factor=28, min_pixels=3136, max_pixels=12845056)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
