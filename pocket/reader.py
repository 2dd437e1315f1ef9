"""The pocket model's text encoder as it is trained: transformers' module, and the questions that it is asked."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pocket.edits import EDITS, Instruction
from pocket.prompts import Prompts
from pocket.run import averaged
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = ["Reader", "load", "to_patches"]

OPTIONS = ("colour", "shape", "place")

WORDS = 10.0
"""Spread of embeddings to begin with: beside what blocks add, words of the usual 0.02 look all alike at the end."""


class Reader(nn.Module):
    """The text encoder, asked at the end of every instruction what that was, and of every option which.

    The published model starts from a language model that can read, and never trains it. Without one the transformer
    learns to do without words: it copies, and a thousand steps do not change that. The questions are the same for the
    first and the second of two instructions, so that each is read by itself, whatever it stands beside; asked for both
    at the end of the prompt, it learns which edits come together, and reads others wrong. They are left behind.
    """

    ANSWERS: ClassVar[dict[str, tuple[str, ...]]] = {
        "name": tuple(EDITS),
        **{key: tuple(sorted({v for e in EDITS.values() for v in e.options.get(key, ())})) for key in OPTIONS},
    }

    def __init__(self, configs: Path) -> None:
        super().__init__()
        config = Qwen2_5_VLConfig.from_pretrained(configs / "text_encoder")
        self.text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        self.text_encoder.lm_head.requires_grad_(False)
        nn.init.normal_(self.text_encoder.model.language_model.embed_tokens.weight, std=WORDS)
        width = config.text_config.hidden_size
        self.heads = nn.ModuleDict({key: nn.Linear(width, 1 + len(known)) for key, known in self.ANSWERS.items()})
        self.colours = nn.Linear(width, 3)

    def prompt(self, batch: Prompts) -> Tensor:
        """[B, S - 64, D]: the last hidden states behind the template's prefix."""
        model, config = self.text_encoder.model, self.text_encoder.config
        patches, grid = to_patches(batch.seen)
        images = model.visual(patches, grid_thw=grid).pooler_output
        embeds = model.language_model.embed_tokens(batch.input_ids)
        places = (batch.input_ids == config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, images.to(embeds.dtype))
        hidden = model.language_model(
            inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        return hidden[:, PREFIX_TOKENS:]

    def forward(self, prompts: Prompts) -> Tensor:
        """The mean cross entropy of the answers, and the square error of the mean colour of every image token."""
        hidden = self.prompt(prompts)
        states = self.said(hidden, prompts)
        loss = hidden.new_zeros(())
        for key, head in self.heads.items():
            marks = [number for number, mark in enumerate(prompts.marks) if mark.key in ("", key)]
            wanted = torch.tensor([self.place(prompts.marks[number].step, key) for number in marks])
            loss = loss + functional.cross_entropy(head(states[marks]).float(), wanted)
        shown = hidden[prompts.input_ids[:, PREFIX_TOKENS:] == self.text_encoder.config.image_token_id]
        seen = prompts.seen.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        colours = functional.avg_pool2d(seen, 28).permute(0, 2, 3, 1).reshape(-1, 3)
        return loss / len(self.heads) + functional.mse_loss(self.colours(shown).float(), colours)

    def said(self, hidden: Tensor, prompts: Prompts) -> Tensor:
        """The hidden states [N, D] at the marks of prompts."""
        return hidden[prompts.places[:, 0], prompts.places[:, 1] - PREFIX_TOKENS]

    def place(self, step: Instruction, key: str) -> int:
        """The place of the answer, 0 where there is none."""
        value = step.name if key == "name" else dict(step.options).get(key)
        return 0 if value is None else 1 + self.ANSWERS[key].index(value)


def load(folder: Path, configs: Path) -> Reader:
    """The text encoder that a run in ``folder`` has come to, the mean of its weights."""
    reader = Reader(configs)
    reader.load_state_dict(averaged(folder)[0], strict=False)  # a checkpoint has no questions
    return reader.eval()


def to_patches(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [P, 1176] and grids [B * K, 3] of pictures uint8 [B, K, h, w, 3], as Qwen2-VL's processor orders them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    images = ((seen.flatten(0, 1).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    count, _, height, width = images.shape
    rows, columns = height // 28, width // 28
    cells = images.reshape(count, 3, rows, 2, 14, columns, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = cells.unsqueeze(6).expand(*cells.shape[:6], 2, 14, 14).reshape(-1, 3 * 2 * 14 * 14)
    return patches, torch.tensor([[1, 2 * rows, 2 * columns]] * count)
