"""The text encoder of the pocket model in training: the module of transformers, and auxiliary heads."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from pocket.data.edits import EDITS, Instruction
from pocket.model.averages import averaged_weights
from pocket.model.prompts import PromptBatch
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = ["TextEncoder", "load_text_encoder", "to_patches"]

OPTIONS = ("color", "shape", "place")

EMBEDDING_STD = 10.0
"""Initial standard deviation of token embeddings. With the usual 0.02 the blocks' output hides them, and the hidden
states of all words are alike."""


class TextEncoder(nn.Module):
    """The text encoder with auxiliary heads that classify each instruction and each option at its last token.

    The published model starts from a pretrained language model and never trains it. Without one, the transformer learns
    to copy its input and ignores the prompt, and a thousand steps do not change that. The heads are the same for the
    first and the second of two instructions, so that each is encoded on its own; trained to classify both at the end
    of the prompt, the encoder learns which edits occur together, and misreads other pairs. The checkpoint drops the
    heads.
    """

    CLASSES: ClassVar[dict[str, tuple[str, ...]]] = {
        "name": tuple(EDITS),
        **{key: tuple(sorted({v for e in EDITS.values() for v in e.options.get(key, ())})) for key in OPTIONS},
    }
    """Head -> its classes; class 0 stands for none."""

    def __init__(self, configs: Path) -> None:
        super().__init__()
        config = Qwen2_5_VLConfig.from_pretrained(configs / "text_encoder")
        self.text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        self.text_encoder.lm_head.requires_grad_(False)
        nn.init.normal_(self.text_encoder.model.language_model.embed_tokens.weight, std=EMBEDDING_STD)
        width = config.text_config.hidden_size
        self.heads = nn.ModuleDict({key: nn.Linear(width, 1 + len(values)) for key, values in self.CLASSES.items()})
        self.color_head = nn.Linear(width, 3)

    def prompt_embeds(self, prompts: PromptBatch) -> Tensor:
        """The last hidden states after the template's prefix, [B, S - 64, D]."""
        model, config = self.text_encoder.model, self.text_encoder.config
        patches, grid = to_patches(prompts.images)
        image_embeds = model.visual(patches, grid_thw=grid).pooler_output
        embeds = model.language_model.embed_tokens(prompts.input_ids)
        is_image = (prompts.input_ids == config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_image, image_embeds.to(embeds.dtype))
        hidden = model.language_model(
            inputs_embeds=embeds, position_ids=prompts.position_ids, attention_mask=prompts.mask, use_cache=False
        ).last_hidden_state
        return hidden[:, PREFIX_TOKENS:]

    def forward(self, prompts: PromptBatch) -> Tensor:
        """The loss: the heads' mean cross entropy, plus the square error of the mean color of every image token."""
        embeds = self.prompt_embeds(prompts)
        states = self.mention_states(embeds, prompts)
        loss = embeds.new_zeros(())
        for key, head in self.heads.items():
            rows = [row for row, mention in enumerate(prompts.mentions) if mention.option in ("", key)]
            targets = torch.tensor([self.class_index(prompts.mentions[row].instruction, key) for row in rows])
            loss = loss + functional.cross_entropy(head(states[rows]).float(), targets)
        image_states = embeds[prompts.input_ids[:, PREFIX_TOKENS:] == self.text_encoder.config.image_token_id]
        images = prompts.images.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
        colors = functional.avg_pool2d(images, 28).permute(0, 2, 3, 1).reshape(-1, 3)
        return loss / len(self.heads) + functional.mse_loss(self.color_head(image_states).float(), colors)

    def mention_states(self, embeds: Tensor, prompts: PromptBatch) -> Tensor:
        """The hidden states of the mentions, [M, D]."""
        return embeds[prompts.mention_index[:, 0], prompts.mention_index[:, 1] - PREFIX_TOKENS]

    def class_index(self, instruction: Instruction, key: str) -> int:
        """The class of ``instruction`` for the head ``key``; 0 where it has no such option."""
        value = instruction.name if key == "name" else dict(instruction.options).get(key)
        return 0 if value is None else 1 + self.CLASSES[key].index(value)


def load_text_encoder(folder: Path, configs: Path) -> TextEncoder:
    """The text encoder of the training in ``folder``, with averaged weights."""
    encoder = TextEncoder(configs)
    encoder.load_state_dict(averaged_weights(folder)[0], strict=False)  # a checkpoint has no heads
    return encoder.eval()


def to_patches(images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [P, 1176] and grids [B * I, 3] of images uint8 [B, I, H, W, 3], as Qwen2VLImageProcessor orders them."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    normalized = ((images.flatten(0, 1).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    count, _, height, width = normalized.shape
    rows, columns = height // 28, width // 28
    cells = normalized.reshape(count, 3, rows, 2, 14, columns, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = cells.unsqueeze(6).expand(*cells.shape[:6], 2, 14, 14).reshape(-1, 3 * 2 * 14 * 14)
    return patches, torch.tensor([[1, 2 * rows, 2 * columns]] * count)
