"""The constants of a model and the limits of its engines, as the manifest holds them.

Plain data: reading a manifest or a recipe imports neither numpy nor Pillow.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from qie.engines.records import Range

__all__ = [
    "DEFAULT_NEGATIVE",
    "LARGEST_SHIFT",
    "MAX_INSTRUCTION_TOKENS",
    "SIDE_MULTIPLE",
    "Areas",
    "Count",
    "PromptSpec",
    "RotarySpec",
    "SchedulerSpec",
    "ShapeLimits",
    "Size",
    "VisionSpec",
]

SIDE_MULTIPLE = 16
"""Every side is a multiple of this many pixels (diffusers pipeline_qwenimage_edit_plus.py: vae_scale_factor * 2)."""

DEFAULT_NEGATIVE = " "
"""The default negative prompt of the model card."""

MAX_INSTRUCTION_TOKENS = 1024
"""Longest instruction (tokenizer_max_length, and the limit of max_sequence_length, in the pipelines)."""


Count = Annotated[int, Range(1, 1 << 20)]
"""A number of things, far above any model's."""

Area = Annotated[int, Range(256, 1 << 32)]
"""Square pixels: from one token of the transformer."""

Side = Annotated[int, Range(SIDE_MULTIPLE, 1 << 16)]
"""Pixels."""

Wavelength = Annotated[float, Range(1.0, 1e12)]
"""The base of rotary wavelengths."""

_Mean = Annotated[float, Range(-100, 100)]
_Std = Annotated[float, Range(1e-3, 1e3)]
_AxisDims = Annotated[int, Range(2, 4096)]

LARGEST_SHIFT = 100
"""Published schedulers shift by 0.5 to 1.15; by this much, every sigma is 1 to the last bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The size of an image in pixels; printed as ``1024x768``."""

    width: Side
    height: Side

    @property
    def area(self) -> int:
        """Square pixels."""
        return self.width * self.height

    @property
    def tokens(self) -> int:
        """Tokens of the transformer."""
        return self.area // SIDE_MULTIPLE**2

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeLimits:
    """What the engines of a bundle take.

    Any size is allowed whose sides are multiples of 16 within the limits and whose area is within the limit.

    Attributes:
        buckets: sizes that the engines are tuned for, at least one.
        min_side: shortest side in pixels.
        max_side: longest side in pixels.
        max_area: largest area in square pixels.
        batch_max: images of one run.
        references_max: input images of an edit.
        prompt_tokens_max: prompt tokens of an edit, with image tokens and without the template's prefix.
    """

    buckets: tuple[Size, ...]
    min_side: Side
    max_side: Side
    max_area: Area
    batch_max: Count
    references_max: Count
    prompt_tokens_max: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Areas:
    """The areas in square pixels to which a model's images are resized.

    Attributes:
        vae_area: of the copy for the VAE encoder.
        condition_area: of the copy for the vision tower (Edit-Plus); None where it takes the VAE's copy (Edit).
    """

    vae_area: Area
    condition_area: Area | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The constants of a vision tower and its image processor that the host needs.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: side in patches of the square that becomes one token of the prompt.
        temporal_patch_size: frames in a patch; an image is repeated that often.
        window_size: side of an attention window in pixels.
        head_dim: channels of an attention head, a multiple of 4.
        rope_theta: base of the rotary wavelengths.
        min_pixels, max_pixels: limits of an image's area in square pixels.
        image_mean, image_std: per channel, for values of 0 .. 1.
    """

    patch_size: Annotated[int, Range(1, 1024)]
    merge_size: Annotated[int, Range(1, 64)]
    temporal_patch_size: Annotated[int, Range(1, 64)]
    window_size: Side
    head_dim: Annotated[int, Range(4, 4096)]
    rope_theta: Wavelength = 10000.0
    min_pixels: Annotated[int, Range(1, 1 << 32)]
    max_pixels: Annotated[int, Range(1, 1 << 32)]
    image_mean: tuple[_Mean, _Mean, _Mean]
    image_std: tuple[_Std, _Std, _Std]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpec:
    """The constants of a prompt.

    Attributes:
        pipeline: "edit" for QwenImageEditPipeline (one image), "edit_plus" for QwenImageEditPlusPipeline (one or more).
        image_token_id: id of <|image_pad|>, ``image_token_id`` of text_encoder/config.json.
        merge_size: side in patches of the square that becomes one token, ``spatial_merge_size`` of the vision tower.
        max_instruction_tokens: longest instruction, in tokens of its own.
    """

    pipeline: Literal["edit", "edit_plus"]
    image_token_id: Annotated[int, Range(0, 1 << 31)]
    merge_size: Annotated[int, Range(1, 64)]
    max_instruction_tokens: Count = MAX_INSTRUCTION_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class RotarySpec:
    """The transformer's rotary embedding.

    Attributes:
        axes_dims: channels of a head for frame, height and width, ``axes_dims_rope`` of transformer/config.json; each
            even.
        theta: base of the wavelengths, 10000 in diffusers transformer_qwenimage.py.
    """

    axes_dims: tuple[_AxisDims, _AxisDims, _AxisDims]
    theta: Wavelength = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """The options of a checkpoint's scheduler_config.json that decide its sigmas.

    The defaults are those of ``FlowMatchEulerDiscreteScheduler`` (diffusers scheduling_flow_match_euler_discrete.py);
    the pipelines fall back to the same four numbers for mu.

    Attributes:
        num_train_timesteps: timesteps of training; a step's timestep is sigma * num_train_timesteps.
        shift: factor of the static shift, used where ``use_dynamic_shifting`` is false.
        use_dynamic_shifting: shift by mu, which is linear in the number of noise tokens.
        base_shift, max_shift: mu at ``base_image_seq_len`` and at ``max_image_seq_len`` tokens.
        base_image_seq_len, max_image_seq_len: numbers of noise tokens.
        shift_terminal: sigma to which the last step is stretched; None or 0 for no stretching.
        time_shift_type: formula of the dynamic shift.
    """

    num_train_timesteps: Count = 1000
    shift: Annotated[float, Range(1e-6, 1e6)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Annotated[float, Range(-LARGEST_SHIFT, LARGEST_SHIFT)] = 0.5
    max_shift: Annotated[float, Range(-LARGEST_SHIFT, LARGEST_SHIFT)] = 1.15
    base_image_seq_len: Annotated[int, Range(0, 1 << 31)] = 256
    max_image_seq_len: Annotated[int, Range(1, 1 << 31)] = 4096
    shift_terminal: Annotated[float, Range(0, 0.999)] | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"
