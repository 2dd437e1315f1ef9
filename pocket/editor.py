"""The pocket model's transformer as it is trained: diffusers' modules.

Their forward is written out here for three reasons: a compiler can fuse it (no complex numbers), it does not compute
what nobody reads, and it can be asked questions on the way.
"""

from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from pocket.batches import Batch

__all__ = ["Editor", "Seer"]


class Editor(nn.Module):
    """The transformer, with the questions that it is asked in training."""

    def __init__(self, configs: Path, *, compile_: bool = True) -> None:
        super().__init__()
        self.transformer = QwenImageTransformer2DModel.from_config(
            QwenImageTransformer2DModel.load_config(configs / "transformer")
        )
        self.seer = Seer(self.transformer.inner_dim)
        _begin(self.transformer)
        self.run = torch.compile(self.flow, dynamic=False) if compile_ else self.flow

    def forward(self, batch: Batch, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity [B, N, 64] of ``noisy`` at ``sigma`` [B], and the loss of the seer's answers."""
        height, width, pictures = batch.form
        grid = (1, height // 16, width // 16)
        image, text = self.transformer.pos_embed(
            [[grid] * (1 + pictures)], max_txt_seq_len=batch.prompt.shape[1], device=noisy.device
        )
        angles = torch.cat([text, image])
        references, prompt = batch.references.to(noisy.dtype), batch.prompt.to(noisy.dtype)
        places = self.seer.places(grid[1], grid[2])
        return self.run(noisy, references, prompt, batch.words, sigma, angles.real, angles.imag, batch.source, places)

    def flow(
        self,
        noisy: Tensor,
        references: Tensor,
        prompt: Tensor,
        words: Tensor,
        sigma: Tensor,
        cos: Tensor,
        sin: Tensor,
        source: Tensor,
        places: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Diffusers transformer_qwenimage.py, QwenImageTransformer2DModel and its blocks, with ``zero_cond_t``."""
        t, batch, noise = self.transformer, len(noisy), noisy.shape[1]
        image = t.img_in(torch.cat([noisy, references], 1))
        text = t.txt_in(t.txt_norm(prompt))
        moments = t.time_text_embed(torch.cat([sigma, sigma[:1] * 0]), image)
        now, clean = moments[:batch], moments[batch:]
        mask = torch.cat([words, words.new_ones(batch, image.shape[1])], 1)[:, None, None]
        loss = image.new_zeros((), dtype=torch.float32)
        for number, block in enumerate(t.transformer_blocks):
            last = number + 1 == len(t.transformer_blocks)  # there only the noise's tokens are read on
            one, two = _chunks(block.img_mod(now), block.img_mod(clean), noise, image)
            text_one, text_two = (c.unsqueeze(1).chunk(3, -1) for c in block.txt_mod(now).chunk(2, -1))
            attention = block.attn
            normed, said = _modulate(block.img_norm1(image), one), _modulate(block.txt_norm1(text), text_one)
            length = said.shape[1]

            def heads(x: Tensor) -> Tensor:
                return x.unflatten(-1, (-1, t.config.attention_head_dim))

            k = torch.cat([attention.norm_added_k(heads(attention.add_k_proj(said))),
                           attention.norm_k(heads(attention.to_k(normed)))], 1)  # fmt: skip
            v = torch.cat([heads(attention.add_v_proj(said)), heads(attention.to_v(normed))], 1)
            if last:
                image, normed, said = image[:, :noise], normed[:, :noise], said[:, :0]
                one, two = ([part[:, :noise] for part in parts] for parts in (one, two))
            q = torch.cat([attention.norm_added_q(heads(attention.add_q_proj(said))),
                           attention.norm_q(heads(attention.to_q(normed)))], 1)  # fmt: skip
            asking = slice(length, length + noise) if last else slice(None)
            q, k = _rotate(q, cos[asking], sin[asking]).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2)
            y = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
            spoken, y = y.transpose(1, 2).flatten(2).split([said.shape[1], normed.shape[1]], 1)
            if number == Seer.LOOKS:
                start = length + noise
                loss = loss + self.seer.looks(q[:, 0, length:start], k[:, 0], mask[:, 0], source + start)
            image = image + one[2] * attention.to_out[0](y)
            image = image + two[2] * block.img_mlp(_modulate(block.img_norm2(image), two))
            if not last:
                text = text + text_one[2] * attention.to_add_out(spoken)
                text = text + text_two[2] * block.txt_mlp(_modulate(block.txt_norm2(text), text_two))
            if number in Seer.STANDS:
                loss = loss + self.seer.stands(number, image, places)
        output = t.proj_out(t.norm_out(image, now))
        return output, loss


def _begin(transformer: QwenImageTransformer2DModel) -> None:
    """Weights to begin with: blocks that do little whatever the time, and nothing said at the end.

    Queries and keys get a bias in common, so that a token looks at its own place in every picture from the start.
    """
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                modulation.weight.zero_()
                parts = zip(modulation.bias.chunk(6), (0, 0, 0.3, 0, 0, 0.3), strict=True)
                for part, value in parts:
                    part.fill_(value)
            shared = torch.randn_like(block.attn.to_q.bias)
            block.attn.to_q.bias.copy_(shared)
            block.attn.to_k.bias.copy_(shared)
            for norm in (block.attn.norm_q, block.attn.norm_k):
                norm.weight.fill_(1.5)
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()


def _chunks(now: Tensor, clean: Tensor, noise: int, image: Tensor) -> list[tuple[Tensor, ...]]:
    """Shift, scale and gate [B, T, D] of both halves of a block: of now for noise, of time 0 for references."""
    rest = image.shape[1] - noise
    whole = torch.cat([now.unsqueeze(1).expand(-1, noise, -1), clean.unsqueeze(1).expand(len(now), rest, -1)], 1)
    return [half.chunk(3, -1) for half in whole.chunk(2, -1)]


def _modulate(x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    return x * (1 + parts[1]) + parts[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of [B, S, H, D] turned by angles whose cosines and sines are [S, D / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(3).type_as(x)


class Seer(nn.Module):
    """What the transformer is asked in training besides the velocity.

    Rotary embedding tells how far tokens are apart and not where they are, so mirroring takes two things that a
    gradient through pixels finds slowly: to know one's own place, and to look at another. Tokens are asked for their
    row and column after the first blocks, and one head in the middle is shown where to look. Nothing of this is left in
    the checkpoint but what was learned by it.
    """

    LOOKS = 2
    """The block whose first head is shown where to look."""

    STANDS = (0, 1)
    """The blocks after which tokens are asked where they are."""

    SIDES = 16
    """More rows or columns than any picture has, in tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, 2 * self.SIDES) for _ in self.STANDS])

    def places(self, height: int, width: int) -> Tensor:
        """Row and column of every token, [N, 2]."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([rows.reshape(-1), columns.reshape(-1)], -1)

    def stands(self, number: int, image: Tensor, places: Tensor) -> Tensor:
        """Cross entropy of rows and columns, of all pictures."""
        answers = self.heads[self.STANDS.index(number)](functional.layer_norm(image, image.shape[-1:])).float()
        wanted = places.repeat(image.shape[1] // len(places), 1).expand(len(image), -1, -1)
        return sum(
            functional.cross_entropy(part.flatten(0, 1), wanted[..., axis].reshape(-1))
            for axis, part in enumerate(answers.chunk(2, -1))
        )

    def looks(self, q: Tensor, k: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Cross entropy of one head's attention, of queries [B, N, D] over keys [B, S, D]."""
        scores = (q @ k.transpose(1, 2)).float() * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        return functional.cross_entropy(scores.flatten(0, 1), wanted.reshape(-1))
