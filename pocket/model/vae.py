"""The VAE of the pocket model in training: the module of diffusers with 2-D convolutions.

A video VAE's causal convolutions see zeros before a single frame, so they equal 2-D convolutions with the last temporal
slice of their kernels, a third of the work. ``build_vae`` builds that, ``unfold`` turns trained weights into 3-D again.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

from pocket.model.averages import averaged_weights
from qie.compiler.synthetic.architecture import ARCHITECTURES

__all__ = ["FrameConv", "build_vae", "decode", "encode", "fold", "load_vae", "to_unit", "unfold"]


class FrameConv(nn.Module):
    """The last temporal slice of a causal convolution, for single frames [B, C, 1, H, W]."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach()[:, :, -1].clone())
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        return functional.conv2d(x[:, :, 0], self.weight, self.bias, padding=self.weight.shape[-1] // 2).unsqueeze(2)


def fold(module: nn.Module) -> None:
    """Replace every causal convolution inside ``module`` by its 2-D slice."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child))
        else:
            fold(child)


def unfold(folded: dict[str, Tensor], vae: nn.Module) -> dict[str, Tensor]:
    """The state of ``vae`` with 3-D kernels: the trained slices last, zeros elsewhere."""
    state = {}
    for name, value in vae.state_dict().items():
        trained = folded.get(name)
        if trained is not None and trained.ndim == value.ndim - 1:
            state[name] = torch.zeros_like(value)
            state[name][:, :, -1] = trained
        else:
            state[name] = torch.zeros_like(value) if trained is None else trained
    return state


def build_vae() -> AutoencoderKLQwenImage:
    """The folded VAE with initial weights, without the temporal convolutions that a single frame never reaches."""
    a = ARCHITECTURES["pocket"]
    vae = AutoencoderKLQwenImage(
        base_dim=a.vae_base_dim, z_dim=a.vae_z_dim, dim_mult=list(a.vae_dim_mult), num_res_blocks=a.vae_num_res_blocks
    )
    for module in vae.modules():
        if hasattr(module, "time_conv"):
            del module.time_conv
    fold(vae)
    _initialize(vae)
    return vae.to(memory_format=torch.channels_last)


def _initialize(vae: nn.Module) -> None:
    """Kernels that preserve the variance, and residual branches that output zero: the network starts out linear."""
    for module in vae.modules():
        if isinstance(module, FrameConv | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        last = getattr(module, "conv2", None) or getattr(module, "proj", None)
        if last is not None:
            nn.init.zeros_(last.weight)


def load_vae(folder: Path) -> AutoencoderKLQwenImage:
    """The VAE of the training in ``folder``, with averaged weights."""
    vae = build_vae()
    vae.load_state_dict(averaged_weights(folder)[0])
    return vae.eval()


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, 1, H, W] in -1 .. 1."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).unsqueeze(2)


def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """Images [B, 3, 1, H, W] in -1 .. 1 to the posterior's mode [B, 16, 1, H/8, W/8]."""
    return vae.quant_conv(vae.encoder(x))[:, :16]


def decode(vae: AutoencoderKLQwenImage, z: Tensor) -> Tensor:
    """Latents [B, 16, 1, H/8, W/8] to images [B, 3, 1, H, W], not clamped to -1 .. 1."""
    return vae.decoder(vae.post_quant_conv(z))
