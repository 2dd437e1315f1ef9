"""The noise schedule of an edit: sigmas for a number of steps and a number of noise tokens.

The arithmetic follows diffusers: the `QwenImageEdit*Pipeline.__call__` functions make linear sigmas and mu in float64,
`FlowMatchEulerDiscreteScheduler.set_timesteps` shifts and stretches them in float32. Results are equal to the last bit.

Shape suffixes: S steps.
"""

import math

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import SchedulerSpec
from qie.engines.errors import EditError

__all__ = ["LARGEST_SHIFT", "sigmas"]

LARGEST_SHIFT = 100
"""Published schedulers shift by 0.5 to 1.15; by this much, every sigma is 1 to the last bit."""


def sigmas(spec: SchedulerSpec, *, steps: int, noise_tokens: int) -> NDArray[np.float32]:
    """Sigmas of a schedule: float32 [steps + 1], from 1 downwards, the last one 0.

    steps: number of denoising steps, at least 1
    noise_tokens: tokens of the picture being made, (height / 16) * (width / 16); reference images do not count

    A single step cannot both start at 1 and end at `shift_terminal` (diffusers gives NaN): it runs from 1 to 0.
    Raises EditError when steps is below 1, or when a damaged scheduler leaves no schedule.
    """
    if steps < 1:
        raise EditError(f"An edit of {steps} steps was asked for, but it needs at least 1: raise the number of steps.")
    sigma_S = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    one = np.float32(1)
    if spec.use_dynamic_shifting:
        mu = _mu(spec, noise_tokens)
        if mu > LARGEST_SHIFT:
            raise EditError(
                f"The checkpoint's scheduler shifts a picture of {noise_tokens} tokens by {mu:g}, which leaves no "
                "schedule: take the scheduler folder of the published checkpoint."
            )
        weight = np.float32(math.exp(mu) if spec.time_shift_type == "exponential" else mu)
        sigma_S = weight / (weight + (one / sigma_S - one))
    else:
        sigma_S = np.float32(spec.shift) * sigma_S / (one + np.float32(spec.shift - 1) * sigma_S)
    if spec.shift_terminal and steps > 1:
        signal_S = one - sigma_S
        sigma_S = one - signal_S / (signal_S[-1] / np.float32(1 - spec.shift_terminal))
    return np.append(sigma_S, np.float32(0))


def _mu(spec: SchedulerSpec, noise_tokens: int) -> float:
    """The line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) (`calculate_shift`)."""
    slope = (spec.max_shift - spec.base_shift) / (spec.max_image_seq_len - spec.base_image_seq_len)
    return noise_tokens * slope + (spec.base_shift - slope * spec.base_image_seq_len)
