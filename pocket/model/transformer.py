"""The transformer of the pocket model in training: the module of diffusers, and auxiliary heads.

The forward pass is written out for three reasons: a compiler can fuse it (no complex numbers), it skips what nothing
reads, and the auxiliary losses need intermediate values.

Shape suffixes: B batch, N noise tokens, R reference tokens, T = N + R, L text tokens, S = L + T, D width, H heads,
K head width.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from pocket.model.batches import Batch

__all__ = ["AuxiliaryHeads", "Transformer"]


class Modulation(NamedTuple):
    """Shift, scale and gate of one branch, broadcastable to its tokens."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Transformer(nn.Module):
    """The transformer with its auxiliary heads; ``compiled=False`` leaves torch.compile out."""

    def __init__(self, configs: Path, *, compiled: bool = True) -> None:
        super().__init__()
        self.transformer = QwenImageTransformer2DModel.from_config(
            QwenImageTransformer2DModel.load_config(configs / "transformer")
        )
        self.auxiliary = AuxiliaryHeads(self.transformer.inner_dim)
        _initialize(self.transformer)
        self.run = torch.compile(self.velocity, dynamic=False) if compiled else self.velocity

    def forward(self, batch: Batch, noisy_BNC: Tensor, sigma_B: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity [B, N, 64] of ``noisy_BNC`` at ``sigma_B``, and the auxiliary loss."""
        height, width, references = batch.shape
        grid = (1, height // 16, width // 16)
        image, text = self.transformer.pos_embed(
            [[grid] * (1 + references)], max_txt_seq_len=batch.prompt.shape[1], device=noisy_BNC.device
        )
        angles = torch.cat([text, image])
        return self.run(
            noisy_BNC,
            batch.references.to(noisy_BNC.dtype),
            batch.prompt.to(noisy_BNC.dtype),
            batch.prompt_mask,
            sigma_B,
            angles.real,
            angles.imag,
            batch.source_index,
            token_positions(grid[1], grid[2]),
        )

    def velocity(
        self,
        noisy_BNC: Tensor,
        references_BRC: Tensor,
        prompt_BLJ: Tensor,
        prompt_mask_BL: Tensor,
        sigma_B: Tensor,
        cos: Tensor,
        sin: Tensor,
        source_index_BN: Tensor,
        positions_N2: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Diffusers transformer_qwenimage.py, QwenImageTransformer2DModel and its blocks, with ``zero_cond_t``."""
        t, batch, noise = self.transformer, len(noisy_BNC), noisy_BNC.shape[1]
        image_BTD = t.img_in(torch.cat([noisy_BNC, references_BRC], 1))
        text_BLD = t.txt_in(t.txt_norm(prompt_BLJ))
        embeds = t.time_text_embed(torch.cat([sigma_B, sigma_B[:1] * 0]), image_BTD)
        noise_embed, reference_embed = embeds[:batch], embeds[batch:]
        image_mask_BT = prompt_mask_BL.new_ones(batch, image_BTD.shape[1])
        mask = torch.cat([prompt_mask_BL, image_mask_BT], 1)[:, None, None]
        loss = image_BTD.new_zeros((), dtype=torch.float32)
        for number, block in enumerate(t.transformer_blocks):
            last = number + 1 == len(t.transformer_blocks)  # whose output is read only for noise tokens
            attention_mod, mlp_mod = _image_modulation(
                block.img_mod(noise_embed), block.img_mod(reference_embed), noise, image_BTD.shape[1]
            )
            text_attention_mod, text_mlp_mod = _modulations(block.txt_mod(noise_embed).unsqueeze(1))
            attention = block.attn
            image_in = _modulate(block.img_norm1(image_BTD), attention_mod)
            text_in = _modulate(block.txt_norm1(text_BLD), text_attention_mod)
            length = text_in.shape[1]

            def heads(x: Tensor) -> Tensor:
                return x.unflatten(-1, (-1, t.config.attention_head_dim))

            k = torch.cat([attention.norm_added_k(heads(attention.add_k_proj(text_in))),
                           attention.norm_k(heads(attention.to_k(image_in)))], 1)  # fmt: skip
            v = torch.cat([heads(attention.add_v_proj(text_in)), heads(attention.to_v(image_in))], 1)
            if last:
                image_BTD, image_in, text_in = image_BTD[:, :noise], image_in[:, :noise], text_in[:, :0]
                attention_mod, mlp_mod = (Modulation(*(x[:, :noise] for x in m)) for m in (attention_mod, mlp_mod))
            q = torch.cat([attention.norm_added_q(heads(attention.add_q_proj(text_in))),
                           attention.norm_q(heads(attention.to_q(image_in)))], 1)  # fmt: skip
            queries = slice(length, length + noise) if last else slice(None)
            q, k = _rotate(q, cos[queries], sin[queries]).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2)
            joint = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
            text_out, image_out = joint.transpose(1, 2).flatten(2).split([text_in.shape[1], image_in.shape[1]], 1)
            if number == AuxiliaryHeads.ATTENTION_BLOCK:
                start = length + noise
                loss = loss + attention_loss(q[:, 0, length:start], k[:, 0], mask[:, 0], source_index_BN + start)
            image_BTD = image_BTD + attention_mod.gate * attention.to_out[0](image_out)
            image_BTD = image_BTD + mlp_mod.gate * block.img_mlp(_modulate(block.img_norm2(image_BTD), mlp_mod))
            if not last:
                text_BLD = text_BLD + text_attention_mod.gate * attention.to_add_out(text_out)
                text_in = _modulate(block.txt_norm2(text_BLD), text_mlp_mod)
                text_BLD = text_BLD + text_mlp_mod.gate * block.txt_mlp(text_in)
            if number in AuxiliaryHeads.POSITION_BLOCKS:
                loss = loss + self.auxiliary.position_loss(number, image_BTD, positions_N2)
        return t.proj_out(t.norm_out(image_BTD, noise_embed)), loss


class AuxiliaryHeads(nn.Module):
    """Heads that predict the row and the column of every token after the first blocks; the checkpoint drops them.

    Rotary embedding encodes the distance of tokens and not their position, so mirroring needs two things that the
    gradient of the velocity alone finds slowly: a token must know its own position, and attend to another. The heads
    teach the first, ``attention_loss`` the second.
    """

    ATTENTION_BLOCK = 2
    """The block whose first head learns where to attend."""

    POSITION_BLOCKS = (0, 1)
    """The blocks after which positions are predicted."""

    MAX_SIDE = 16
    """Upper bound of rows and of columns of tokens in an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_heads = nn.ModuleList([nn.Linear(width, 2 * self.MAX_SIDE) for _ in self.POSITION_BLOCKS])

    def position_loss(self, number: int, image_BTD: Tensor, positions_N2: Tensor) -> Tensor:
        """Cross entropy of row plus that of column after block ``number``, over the tokens of all images."""
        normed = functional.layer_norm(image_BTD, image_BTD.shape[-1:])
        logits = self.position_heads[self.POSITION_BLOCKS.index(number)](normed).float()
        targets = positions_N2.repeat(image_BTD.shape[1] // len(positions_N2), 1).expand(len(image_BTD), -1, -1)
        return sum(
            functional.cross_entropy(part.flatten(0, 1), targets[..., axis].reshape(-1))
            for axis, part in enumerate(logits.chunk(2, -1))
        )


def attention_loss(q_BNK: Tensor, k_BSK: Tensor, mask_B1S: Tensor, target_BN: Tensor) -> Tensor:
    """Cross entropy of one head's attention: each query should attend to the key ``target_BN``."""
    scores = (q_BNK @ k_BSK.transpose(1, 2)).float() * q_BNK.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask_B1S, float("-inf"))
    return functional.cross_entropy(scores.flatten(0, 1), target_BN.reshape(-1))


def token_positions(height: int, width: int) -> Tensor:
    """Row and column of every token of an image, int64 [N, 2]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows.reshape(-1), columns.reshape(-1)], -1)


def _initialize(transformer: QwenImageTransformer2DModel) -> None:
    """Initial weights: small gates at every timestep, and a velocity of zero.

    Queries and keys share a bias, so that a token attends to its own position in every image from the start.
    """
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                modulation.weight.zero_()
                for part, value in zip(modulation.bias.chunk(6), (0, 0, 0.3, 0, 0, 0.3), strict=True):
                    part.fill_(value)
            shared = torch.randn_like(block.attn.to_q.bias)
            block.attn.to_q.bias.copy_(shared)
            block.attn.to_k.bias.copy_(shared)
            for norm in (block.attn.norm_q, block.attn.norm_k):
                norm.weight.fill_(1.5)
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()


def _modulations(values: Tensor) -> tuple[Modulation, Modulation]:
    """The modulation of attention and of feed-forward from [..., 6 * D]."""
    attention, mlp = values.chunk(2, -1)
    return Modulation(*attention.chunk(3, -1)), Modulation(*mlp.chunk(3, -1))


def _image_modulation(
    noise: Tensor, reference: Tensor, noise_tokens: int, tokens: int
) -> tuple[Modulation, Modulation]:
    """The modulation of the image stream, [B, T, D] each: ``noise`` for noise tokens, ``reference`` for the rest."""
    of_noise = noise.unsqueeze(1).expand(-1, noise_tokens, -1)
    of_references = reference.unsqueeze(1).expand(len(noise), tokens - noise_tokens, -1)
    return _modulations(torch.cat([of_noise, of_references], 1))


def _modulate(x: Tensor, modulation: Modulation) -> Tensor:
    return x * (1 + modulation.scale) + modulation.shift


def _rotate(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs; ``cos`` and ``sin`` are [S, K / 2]."""
    even, odd = x_BSHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3).type_as(x_BSHK)
